"""Llama as a MindSpore cell of graph ops: one compiled graph for steps of any shape.

The graph does what `model.Llama` does with the same kernels, and its logits have the same bits. It
costs more on a CPU, where MindSpore adds microseconds to each operator (benchmarks/bench_calls.py);
it is there for graphs that Llama is to be a part of, and for devices that run graphs best.

MindSpore compiles more than about a hundred operators into an asynchronous pipeline whose threads
take the cores from the kernels. Set `MS_DEV_RUNTIME_CONF=graph_pipeline:false` in the environment
before MindSpore is imported; without it a step may take ten times as long.
"""

from __future__ import annotations

from collections.abc import Mapping

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import joined_biases
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.model.weights import LayerWeights, LlamaWeights
from codellama_rt.ops import Quantized, graph
from codellama_rt.ops.quantized import CACHE_DTYPES

Weight = np.ndarray | Quantized
Format = tuple[str, tuple[int, ...]]  # dtype and shape of what bytes stand for
_JOINED = {  # biases that are added to results side by side
    "qkv_bias": ("q_proj", "k_proj", "v_proj"),
    "o_bias": ("o_proj",),
    "gate_up_bias": ("gate_proj", "up_proj"),
    "down_bias": ("down_proj",),
}


class LlamaCell(nn.Cell):
    """The decoder as a graph; it holds the weights as they lie, and no sequence's state.

    Args:
        config: the model.
        weights: its weights; their memory is used, not copied.
        whole_layers: one operator per layer instead of nine.

    Example:
        >>> cell = LlamaCell(checkpoint.config, checkpoint.weights)  # doctest: +SKIP
        >>> engine = Engine(cell, kv_cache, max_model_len=16384)  # doctest: +SKIP
    """

    kv_cache_type = KVCache
    applies_adapters = False
    gives_hidden_states = False

    def __init__(
        self, config: ModelConfig, weights: LlamaWeights, *, whole_layers: bool = False
    ) -> None:
        """Make parameters over the weights; the graph is compiled by the first step."""
        super().__init__(auto_prefix=False)
        if whole_layers and config.biased:
            raise ValueError("whole_layers=True does not support projections with biases")
        self.config = config
        self.rope = RotaryEmbedding(config)
        self.whole_layers = whole_layers
        self.n_layers, self.eps = config.n_layers, config.norm_eps
        _set_weights(self, "", {n: getattr(weights, n) for n in ("embedding", "norm", "lm_head")})
        self.layers = nn.CellList(
            [
                LayerCell(config, layer, f"layers.{i}", weights.biases[i] if weights.biases else {})
                for i, layer in enumerate(weights.layers)
            ],
            auto_prefix=False,
        )
        self._cache_dtype = self._quantized_cache = ""
        self._cache_format: Format | None = None

    def forward(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """Compute one step: write the tokens' keys and values, and return the logits asked for.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: those blocks.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        logits = self(*self.inputs(batch, kv_cache)).asnumpy()
        return logits[: len(batch.logit_rows)]

    def inputs(self, batch: Batch, kv_cache: KVCache) -> list[Tensor]:
        """Return the graph's arguments for a step, over the memory of `batch` and `kv_cache`."""
        if kv_cache.dtype != self._cache_dtype:
            self._choose_caches(kv_cache)
        rows = batch.logit_rows if len(batch.logit_rows) else np.zeros(1, np.int32)  # never empty
        cos, sin, index = self.rope.lookup(batch.positions, batch.rope_lengths)
        arrays = [
            batch.token_ids,
            rows,
            cos,
            sin,
            index,
            batch.slot_mapping,
            batch.block_tables,
            batch.seq_lens,
            batch.cu_seqlens_q,
        ]
        arrays += [_memory_of(cache) for caches in kv_cache.layers for cache in caches]
        return [Tensor.from_numpy(array) for array in arrays]

    def _choose_caches(self, kv_cache: KVCache) -> None:
        """Describe the blocks to the compiler. Two quantised dtypes would look alike to it."""
        self._cache_format = _format_of(kv_cache.layers[0][0])
        if self._cache_format is not None:
            if self._quantized_cache not in ("", kv_cache.dtype):
                raise ValueError(
                    f"this LlamaCell was compiled for a cache in {self._quantized_cache}, got one "
                    f"in {kv_cache.dtype}; make another LlamaCell for it"
                )
            self._quantized_cache = kv_cache.dtype
        self._cache_dtype = kv_cache.dtype
        self.set_inputs(*_dynamic_inputs(self.config, kv_cache.dtype))

    @mindspore.jit
    def construct(
        self,
        token_ids: Tensor,
        logit_rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        *blocks: Tensor,
    ) -> Tensor:
        """Compute a step; `blocks` are the key and value cache of each layer in turn."""
        rope, sequences = (cos, sin, index), (block_tables, seq_lens, cu_seqlens_q)
        caches = [_as_given(cache, self._cache_format) for cache in blocks]
        residual = graph.embedding(token_ids, _as_given(self.embedding, self.embedding_format))
        lm_head = _as_given(self.lm_head, self.lm_head_format)
        if self.whole_layers:
            for i in range(self.n_layers):
                pair = (caches[2 * i], caches[2 * i + 1])
                residual = self.layers[i].whole(residual, rope, pair, slot_mapping, sequences)
            x = graph.rms_norm(graph.embedding(logit_rows, residual), self.norm, self.eps)
            return graph.linear(x, lm_head)
        x = graph.rms_norm(residual, self.layers[0].attention_norm, self.eps)
        for i in range(self.n_layers):
            pair = (caches[2 * i], caches[2 * i + 1])
            attended = self.layers[i].attend(x, rope, pair, slot_mapping, sequences)
            if i + 1 == self.n_layers:  # from here on only what the logits depend on
                attended = graph.embedding(logit_rows, attended)
                residual = graph.embedding(logit_rows, residual)
            sublayer = self.layers[i].output(attended)
            norm = self.layers[i].mlp_norm
            x, residual = graph.add_rms_norm(sublayer, residual, norm, self.eps)
            sublayer = self.layers[i].mlp(x)
            norm = self.layers[i + 1].attention_norm if i + 1 < self.n_layers else self.norm
            x, residual = graph.add_rms_norm(sublayer, residual, norm, self.eps)
        return graph.linear(x, lm_head)


class LayerCell(nn.Cell):
    """The weights of one layer, and its parts of a graph."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        name: str,
        biases: Mapping[str, np.ndarray],
    ) -> None:
        """Make parameters over the weights."""
        super().__init__(auto_prefix=False)
        self.eps, self.interleaved = config.norm_eps, config.rope_interleaved
        self.q_dim = config.n_heads * config.head_dim
        self.qkv_runs = _runs(weights.q_proj, weights.k_proj, weights.v_proj)
        self.gate_up_runs = _runs(weights.gate_proj, weights.up_proj)
        _set_weights(self, f"{name}.", vars(weights))
        for part, members in _JOINED.items():
            joined = joined_biases({m: getattr(weights, m) for m in members}, biases)
            setattr(self, f"has_{part}", joined is not None)
            if joined is not None:
                setattr(self, part, _parameter(f"{name}.{part}", joined))

    def attend(
        self,
        x: Tensor,
        rope: tuple[Tensor, ...],
        caches: tuple[Tensor, ...],
        slot_mapping: Tensor,
        sequences: tuple[Tensor, ...],
    ) -> Tensor:
        """Take (num_tokens, dim), normalized, to all heads side by side; write the caches."""
        q_proj = _as_given(self.q_proj, self.q_proj_format)
        k_proj = _as_given(self.k_proj, self.k_proj_format)
        v_proj = _as_given(self.v_proj, self.v_proj_format)
        qkv = _project(x, (q_proj, k_proj, v_proj), self.qkv_runs)
        if self.has_qkv_bias:
            qkv = qkv + self.qkv_bias
        query = graph.rope_and_cache(
            qkv, *rope, *caches, slot_mapping, interleaved=self.interleaved
        )
        attended, _ = graph.paged_attention(query, *caches, *sequences)
        return attended.reshape(-1, self.q_dim)

    def output(self, attended: Tensor) -> Tensor:
        """Take all heads side by side, (num_tokens, n_heads * head_dim), to (num_tokens, dim)."""
        sublayer = graph.linear(attended, _as_given(self.o_proj, self.o_proj_format))
        return sublayer + self.o_bias if self.has_o_bias else sublayer

    def mlp(self, x: Tensor) -> Tensor:
        """Take (num_tokens, dim), normalized, to (num_tokens, dim)."""
        gate_proj = _as_given(self.gate_proj, self.gate_proj_format)
        up_proj = _as_given(self.up_proj, self.up_proj_format)
        gate_up = _project(x, (gate_proj, up_proj), self.gate_up_runs)
        if self.has_gate_up_bias:
            gate_up = gate_up + self.gate_up_bias
        hidden = graph.silu_and_mul(gate_up)
        sublayer = graph.linear(hidden, _as_given(self.down_proj, self.down_proj_format))
        return sublayer + self.down_bias if self.has_down_bias else sublayer

    def whole(
        self,
        x: Tensor,
        rope: tuple[Tensor, ...],
        caches: tuple[Tensor, ...],
        slot_mapping: Tensor,
        sequences: tuple[Tensor, ...],
    ) -> Tensor:
        """Take the residual stream, (num_tokens, dim), through the layer as one operator."""
        return graph.decoder_layer(
            x,
            self.attention_norm,
            _as_given(self.q_proj, self.q_proj_format),
            _as_given(self.k_proj, self.k_proj_format),
            _as_given(self.v_proj, self.v_proj_format),
            _as_given(self.o_proj, self.o_proj_format),
            self.mlp_norm,
            _as_given(self.gate_proj, self.gate_proj_format),
            _as_given(self.up_proj, self.up_proj_format),
            _as_given(self.down_proj, self.down_proj_format),
            *rope,
            *caches,
            slot_mapping,
            *sequences,
            eps=self.eps,
            interleaved=self.interleaved,
        )


def _runs(*weights: Weight) -> tuple[tuple[int, int], ...]:
    """Return [begin, end) of the runs of one dtype, each of which `linear` takes in one pass."""
    dtypes = [str(weight.dtype) for weight in weights]
    begins = [i for i in range(len(dtypes)) if i == 0 or dtypes[i] != dtypes[i - 1]]
    return tuple(zip(begins, [*begins[1:], len(dtypes)], strict=True))


def _project(
    x: Tensor, weights: tuple[Tensor | tuple, ...], runs: tuple[tuple[int, int], ...]
) -> Tensor:
    """Multiply x by all weights; their results stand side by side."""
    if len(runs) == 1:
        return graph.linear(x, weights)
    return mindspore.ops.concat([graph.linear(x, weights[begin:end]) for begin, end in runs], -1)


def _set_weights(cell: nn.Cell, prefix: str, weights: Mapping[str, Weight]) -> None:
    """Set parameters over the weights' memory, and beside each the format of its bytes."""
    for part, weight in weights.items():
        setattr(cell, part, _parameter(prefix + part, _memory_of(weight)))
        setattr(cell, f"{part}_format", _format_of(weight))


def _memory_of(weight: Weight) -> np.ndarray:
    return weight.payload if isinstance(weight, Quantized) else weight


def _format_of(weight: Weight) -> Format | None:
    return (weight.dtype, tuple(weight.shape)) if isinstance(weight, Quantized) else None


def _as_given(tensor: Tensor, format_: Format | None) -> Tensor | tuple:
    """Return what `ops.graph` takes inside a graph."""
    return tensor if format_ is None else (tensor, format_[0], format_[1])


def _parameter(name: str, array: np.ndarray) -> Parameter:
    """Make a parameter over the array's memory: made of a tensor, it would copy that."""
    parameter = Parameter(
        Tensor.from_numpy(np.zeros(1, array.dtype)), name=name, requires_grad=False
    )
    parameter.assign_value(Tensor.from_numpy(array))
    return parameter


def _dynamic_inputs(config: ModelConfig, cache_dtype: str) -> list[Tensor]:
    """Return the arguments of the graph, with None for the sizes that vary between steps."""

    def integers(*shape: int | None) -> Tensor:
        return Tensor(shape=shape, dtype=mindspore.int32)

    table = Tensor(shape=(None, config.head_dim // 2), dtype=mindspore.float32)
    if cache_dtype in CACHE_DTYPES:
        cache = Tensor(shape=(None, config.n_kv_heads, None), dtype=mindspore.uint8)
    else:
        blocks = (None, config.n_kv_heads, None, config.head_dim)
        cache = Tensor(shape=blocks, dtype=getattr(mindspore, cache_dtype))
    numbers = integers(None)
    return [
        numbers,
        numbers,
        table,
        table,
        numbers,
        numbers,
        integers(None, None),
        numbers,
        numbers,
        *[cache] * (2 * config.n_layers),
    ]
