"""Llama on an Ascend NPU: matrix products by MindSpore, the rest by the kernels of csrc/ascend.

Activations are in the weights' dtype, float16 or bfloat16; the step's integers are computed on the
host and copied to the device. The order of the operators is that of `model.Llama`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import mindspore
import numpy as np
from mindspore import Tensor, mint

from codellama_rt.model.ascend import ops as ascend
from codellama_rt.model.ascend import vendor as ascend_vendor
from codellama_rt.model.ascend.checks import ASCEND_FLOATS
from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import check_blocks
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.model.weights import LayerWeights, LlamaWeights

ATTENTIONS = {"custom": ascend, "vendor": ascend_vendor}
BLOCK_SIZE = 128  # required by Huawei's attention; a DMA of 32 KB at head_dim 128


class AscendKVCache:
    """Blocks of keys and values in device memory, head-major, one pair of Tensors per layer.

    Attributes:
        num_blocks: blocks per layer.
        block_size: tokens per block.
        dtype: "float16" or "bfloat16".
        num_bytes: of all blocks.
        layers: n_layers pairs (key_cache, value_cache), each
            (num_blocks, n_kv_heads, block_size, head_dim).
    """

    in_host_memory = False

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype: str = "float16",
    ) -> None:
        """Allocate memory for `num_blocks` blocks.

        Raises:
            ValueError: sizes or a dtype that the kernels do not support.
        """
        if dtype not in ASCEND_FLOATS:
            raise ValueError(f"on Ascend kv_dtype must be float16 or bfloat16, got {dtype!r}")
        check_blocks(num_blocks, block_size)
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
        self.num_bytes = 2 * config.n_layers * int(np.prod(shape, dtype=np.int64)) * 2
        element = getattr(mindspore, dtype)
        self.layers = [
            (mint.zeros(shape, dtype=element), mint.zeros(shape, dtype=element))
            for _ in range(config.n_layers)
        ]

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy blocks source -> destination in every layer; block_pairs is (n, 2) int32."""
        for caches in self.layers:
            for cache in caches:
                for source, destination in block_pairs.tolist():
                    cache[destination] = cache[source]

    def close(self) -> None:
        """Forget the blocks; their memory returns to MindSpore's pool."""
        self.layers = []


class AscendLlama:
    """The decoder; it holds the weights on the device, and no state of any sequence.

    Args:
        config: the model.
        weights: its weights, float16 or bfloat16; copied to the device.
        attention: "custom": this project's kernels, attention split over the vector cores;
            "vendor": MindSpore's own kernels, attention on the cube cores.

    Raises:
        ValueError: weights or a RoPE variant that the kernels do not support.
        RuntimeError: the Ascend kernels are not available.
    """

    kv_cache_type = AscendKVCache
    applies_adapters = False
    gives_hidden_states = False

    def __init__(
        self, config: ModelConfig, weights: LlamaWeights, *, attention: str = "custom"
    ) -> None:
        """Copy the weights to the device."""
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be 'custom' or 'vendor', got {attention!r}")
        ascend.require_halves(config.rope_interleaved)
        for name, array in _named(weights):
            if getattr(array, "dtype", None) is None or array.dtype.name not in ASCEND_FLOATS:
                raise ValueError(
                    f"on Ascend weights must be float16 or bfloat16, {name} is "
                    f"{getattr(array, 'dtype', type(array).__name__)}; use dtype='float16'"
                )
        self.config, self.rope = config, RotaryEmbedding(config)
        self.ops: ModuleType = ATTENTIONS[attention]
        self.embedding = Tensor.from_numpy(weights.embedding)
        self.norm = Tensor.from_numpy(weights.norm)
        self.lm_head = Tensor.from_numpy(weights.lm_head)
        self.layers = [_Layer(layer) for layer in weights.layers]
        self._matmul = mindspore.ops.MatMul(transpose_b=True)

    def forward(self, batch: Batch, kv_cache: AscendKVCache) -> np.ndarray:
        """Compute one step: write the tokens' keys and values and return the requested logits.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: the KV cache.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        eps, layers = self.config.norm_eps, self.layers
        rope = self._rope(batch)
        integers = [Tensor(batch.slot_mapping), Tensor(batch.block_tables)]
        residual = mindspore.ops.gather(self.embedding, Tensor(batch.token_ids), 0)
        x = self.ops.rms_norm(residual, layers[0].attention_norm, eps)
        for i, layer in enumerate(layers):
            sublayer = self._attention(layer, x, rope, batch, kv_cache.layers[i], *integers)
            x, residual = self.ops.add_rms_norm(sublayer, residual, layer.mlp_norm, eps)
            hidden = self.ops.silu_and_mul(self._matmul(x, layer.gate_up_proj))
            sublayer = self._matmul(hidden, layer.down_proj)
            norm = layers[i + 1].attention_norm if i + 1 < len(layers) else self.norm
            x, residual = self.ops.add_rms_norm(sublayer, residual, norm, eps)
        if not len(batch.logit_rows):
            return np.empty((0, self.config.vocab_size), np.float32)
        rows = mindspore.ops.gather(x, Tensor(batch.logit_rows), 0)
        return self._matmul(rows, self.lm_head).astype(mindspore.float32).asnumpy()

    def _attention(
        self,
        layer: _Layer,
        x: Tensor,
        rope: tuple[Tensor, ...],
        batch: Batch,
        caches: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
        block_tables: Tensor,
    ) -> Tensor:
        """Map (num_tokens, dim) normalized -> (num_tokens, dim); writes the caches."""
        qkv = self._matmul(x, layer.qkv_proj)
        query = self.ops.rope_and_cache(qkv, *rope, *caches, slot_mapping)
        attended, _ = self.ops.paged_attention(
            query, *caches, block_tables, batch.seq_lens, batch.cu_seqlens_q
        )
        return self._matmul(attended.reshape(x.shape[0], -1), layer.o_proj)

    def _rope(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of this step's positions; the full tables stay on the host."""
        cos, sin, index = self.rope.lookup(batch.positions, batch.rope_lengths)
        rows = np.arange(len(index), dtype=np.int32)
        return Tensor(cos[index]), Tensor(sin[index]), Tensor(rows)


class _Layer:
    """The weights of one layer as Tensors; projections of the same input are concatenated."""

    def __init__(self, weights: LayerWeights) -> None:
        qkv = np.concatenate([weights.q_proj, weights.k_proj, weights.v_proj])
        self.qkv_proj = Tensor.from_numpy(qkv)
        self.gate_up_proj = Tensor.from_numpy(np.concatenate([weights.gate_proj, weights.up_proj]))
        self.o_proj = Tensor.from_numpy(weights.o_proj)
        self.down_proj = Tensor.from_numpy(weights.down_proj)
        self.attention_norm = Tensor.from_numpy(weights.attention_norm)
        self.mlp_norm = Tensor.from_numpy(weights.mlp_norm)


def _named(weights: LlamaWeights) -> Iterator[tuple[str, np.ndarray]]:
    yield from (("embedding", weights.embedding), ("norm", weights.norm))
    yield "lm_head", weights.lm_head
    for i, layer in enumerate(weights.layers):
        for part, array in vars(layer).items():
            yield f"layers.{i}.{part}", array
