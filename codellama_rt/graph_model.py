"""Llama as a MindSpore cell: the registered road, one compiled graph for steps of any shape.

The graph does what `model.Llama` does with the same kernels, and its logits have the same bits. It
costs more on a CPU, where MindSpore adds microseconds to each operator (benchmarks/bench_roads.py);
it is there for graphs that Llama is to be a part of, and for devices that run graphs best.

MindSpore compiles more than about a hundred operators into an asynchronous pipeline whose threads
take the cores from the kernels. Set `MS_DEV_RUNTIME_CONF=graph_pipeline:false` in the environment
before MindSpore is imported; without it a step may take ten times as long.
"""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from codellama_rt.batch import Batch
from codellama_rt.checkpoint import LayerWeights, LlamaWeights
from codellama_rt.config import ModelConfig
from codellama_rt.kv_cache import KVCache
from codellama_rt.ops import graph
from codellama_rt.rope import RotaryEmbedding


class LlamaCell(nn.Cell):
    """The decoder as a graph; it holds the weights as they lie, and no state of any sequence.

    Args:
        config: the model.
        weights: its weights; their memory is used, not copied.
        whole_layers: one operator a layer instead of nine.

    Example:
        >>> cell = LlamaCell(checkpoint.config, checkpoint.weights)  # doctest: +SKIP
        >>> engine = Engine(cell, kv_cache, max_model_len=16384)  # doctest: +SKIP
    """

    def __init__(
        self, config: ModelConfig, weights: LlamaWeights, *, whole_layers: bool = False
    ) -> None:
        """Make parameters over the weights; the graph is compiled by the first step."""
        super().__init__(auto_prefix=False)
        self.config = config
        self.rope = RotaryEmbedding(config)
        self.whole_layers = whole_layers
        self.n_layers, self.eps = config.n_layers, config.norm_eps
        self.embedding = _parameter("embedding", weights.embedding)
        self.norm = _parameter("norm", weights.norm)
        self.lm_head = _parameter("lm_head", weights.lm_head)
        self.layers = nn.CellList(
            [LayerCell(config, layer, f"layers.{i}") for i, layer in enumerate(weights.layers)],
            auto_prefix=False,
        )
        self._cache_dtype = ""

    def forward(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """Compute one step: write the tokens' keys and values, and return the logits asked for.

        Args:
            batch: the tokens of this step; its pages must be allocated.
            kv_cache: the pages.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        logits = self(*self.inputs(batch, kv_cache)).asnumpy()
        return logits[: len(batch.logit_rows)]

    def inputs(self, batch: Batch, kv_cache: KVCache) -> list[Tensor]:
        """The graph's arguments for a step, over the memory of `batch` and `kv_cache`."""
        if kv_cache.dtype != self._cache_dtype:
            self._cache_dtype = kv_cache.dtype
            self.set_inputs(*_dynamic_inputs(self.config, kv_cache.dtype))
        rows = batch.logit_rows if len(batch.logit_rows) else np.zeros(1, np.int32)  # never empty
        cos, sin, index = self.rope.lookup(batch.positions, batch.rope_lengths)
        arrays = [
            batch.token_ids, rows, cos, sin, index, batch.slot_mapping, batch.block_tables,
            batch.seq_lens, batch.cu_seqlens_q,
        ]  # fmt: skip
        arrays += [cache for caches in kv_cache.layers for cache in caches]
        return [Tensor.from_numpy(array) for array in arrays]

    @mindspore.jit
    def construct(
        self, token_ids: Tensor, logit_rows: Tensor, cos: Tensor, sin: Tensor, index: Tensor,
        slot_mapping: Tensor, block_tables: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
        *pages: Tensor,
    ) -> Tensor:  # fmt: skip
        """The graph of a step; `pages` are the key and value cache of each layer in turn."""
        rope, sequences = (cos, sin, index), (block_tables, seq_lens, cu_seqlens_q)
        residual = graph.embedding(token_ids, self.embedding)
        if self.whole_layers:
            for i in range(self.n_layers):
                caches = (pages[2 * i], pages[2 * i + 1])
                residual = self.layers[i].whole(residual, rope, caches, slot_mapping, sequences)
            x = graph.rms_norm(graph.embedding(logit_rows, residual), self.norm, self.eps)
            return graph.linear(x, self.lm_head)
        x = graph.rms_norm(residual, self.layers[0].attention_norm, self.eps)
        for i in range(self.n_layers):
            caches = (pages[2 * i], pages[2 * i + 1])
            sublayer = self.layers[i].attention(x, rope, caches, slot_mapping, sequences)
            norm = self.layers[i].mlp_norm
            x, residual = graph.add_rms_norm(sublayer, residual, norm, self.eps)
            sublayer = self.layers[i].mlp(x)
            norm = self.layers[i + 1].attention_norm if i + 1 < self.n_layers else self.norm
            x, residual = graph.add_rms_norm(sublayer, residual, norm, self.eps)
        return graph.linear(graph.embedding(logit_rows, x), self.lm_head)


class LayerCell(nn.Cell):
    """The weights of one layer, and its two sublayers as parts of a graph."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, name: str) -> None:
        """Make parameters over the weights."""
        super().__init__(auto_prefix=False)
        self.eps, self.interleaved = config.norm_eps, config.rope_interleaved
        self.q_dim = config.n_heads * config.head_dim
        for part, array in vars(weights).items():
            setattr(self, part, _parameter(f"{name}.{part}", array))

    def attention(
        self, x: Tensor, rope: tuple[Tensor, ...], caches: tuple[Tensor, ...], slot_mapping: Tensor,
        sequences: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        """(num_tokens, dim) normalized -> (num_tokens, dim); writes the caches."""
        qkv = graph.linear(x, (self.q_proj, self.k_proj, self.v_proj))
        query = graph.rope_and_cache(
            qkv, *rope, *caches, slot_mapping, interleaved=self.interleaved
        )  # fmt: skip
        attended, _ = graph.paged_attention(query, *caches, *sequences)
        return graph.linear(attended.reshape(-1, self.q_dim), self.o_proj)

    def mlp(self, x: Tensor) -> Tensor:
        """(num_tokens, dim) normalized -> (num_tokens, dim)."""
        hidden = graph.silu_and_mul(graph.linear(x, (self.gate_proj, self.up_proj)))
        return graph.linear(hidden, self.down_proj)

    def whole(
        self, x: Tensor, rope: tuple[Tensor, ...], caches: tuple[Tensor, ...], slot_mapping: Tensor,
        sequences: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        """(num_tokens, dim), the residual stream, through the layer as one operator."""
        return graph.decoder_layer(
            x, self.attention_norm, self.q_proj, self.k_proj, self.v_proj, self.o_proj,
            self.mlp_norm, self.gate_proj, self.up_proj, self.down_proj, *rope, *caches,
            slot_mapping, *sequences, eps=self.eps, interleaved=self.interleaved,
        )  # fmt: skip


def _parameter(name: str, array: np.ndarray) -> Parameter:
    """A parameter over the array's memory: made of a tensor, it would copy that."""
    parameter = Parameter(
        Tensor.from_numpy(np.zeros(1, array.dtype)), name=name, requires_grad=False
    )
    parameter.assign_value(Tensor.from_numpy(array))
    return parameter


def _dynamic_inputs(config: ModelConfig, cache_dtype: str) -> list[Tensor]:
    """The arguments of the graph, with None for the sizes that vary between steps."""

    def integers(*shape: int | None) -> Tensor:
        return Tensor(shape=shape, dtype=mindspore.int32)

    table = Tensor(shape=(None, config.head_dim // 2), dtype=mindspore.float32)
    pages = (None, config.n_kv_heads, None, config.head_dim)
    cache = Tensor(shape=pages, dtype=getattr(mindspore, cache_dtype))
    numbers = integers(None)
    return [
        numbers, numbers, table, table, numbers, numbers, integers(None, None), numbers, numbers,
        *[cache] * (2 * config.n_layers),
    ]  # fmt: skip
