"""Llama (arXiv:2302.13971, arXiv:2307.09288) in the paper's order, on any device's operators.

    x = embedding[token_ids]
    for each layer:
        x = x + attention(rms_norm(x))
        x = x + mlp(rms_norm(x))
    logits = lm_head(rms_norm(x))

`decoder_stack` is the loop, for the CPU and for CUDA; `Llama` is the model on the CPU. There
activations are float32 throughout: they cost nothing beside the weights, and every matrix product
then rounds its input once, as a bfloat16 weight wants it, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from codellama_rt import ops
from codellama_rt.model.batch import Batch, Wanted
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.model.weights import LayerWeights, LlamaWeights, Weight

Array = np.ndarray


def decoder_stack(
    ops: ModuleType,
    linear: Callable[..., Any],
    layers: Sequence[Any],
    config: ModelConfig,
    a: Activations,
    step: StepArrays,
    kv_layers: Sequence[tuple[Any, Any]],
    watch: Callable[[int], None] | None = None,
    narrow: Callable[[Activations], Narrowed] | None = None,
) -> Activations:
    """Take the residual stream through all layers, as far as the last addition to it.

    Args:
        ops: the device's operators, `codellama_rt.ops` or a module with the same functions.
        linear: `linear(x, weight, out=...)`; `weight` is what `layers` holds.
        layers: per layer attention_norm, qkv_proj, o_proj, mlp_norm, gate_up_proj, down_proj.
        config: the model's shape.
        a: `a.residual` holds the embeddings.
        step: which tokens these are, and where their keys and values lie.
        kv_layers: per layer (key_cache, value_cache); written.
        watch: called with each layer's index when `a.residual` is its input.
        narrow: leaves the tokens whose stream is wanted, once the last layer's keys are written.

    Returns:
        The activations of the tokens that are left; `residual + sublayer` is their stream.
    """
    eps, stream, sequences = config.norm_eps, (a.x, a.residual), step.sequences
    next_norms = [*(layer.attention_norm for layer in layers[1:]), None]
    ops.rms_norm(a.residual, layers[0].attention_norm, eps, out=a.x)
    for i, (layer, caches, next_norm) in enumerate(zip(layers, kv_layers, next_norms, strict=True)):
        if watch is not None:
            watch(i)
        linear(a.x, layer.qkv_proj, out=a.qkv)
        ops.rope_and_cache(
            a.qkv, *step.rope, *caches, step.slots, interleaved=config.rope_interleaved, out=a.query
        )
        if next_norm is None and narrow is not None:
            a, sequences, linear = narrow(a)
            stream = a.x, a.residual
        ops.paged_attention(a.query, *caches, *sequences, out=(a.attended, a.lse))
        linear(a.attended_rows, layer.o_proj, out=a.sublayer)
        ops.add_rms_norm(a.sublayer, a.residual, layer.mlp_norm, eps, out=stream)

        linear(a.x, layer.gate_up_proj, out=a.gate_up)
        ops.silu_and_mul(a.gate_up, out=a.hidden)
        linear(a.hidden, layer.down_proj, out=a.sublayer)
        if next_norm is not None:
            ops.add_rms_norm(a.sublayer, a.residual, next_norm, eps, out=stream)
    return a


class StepArrays(NamedTuple):
    """A step's tokens as the operators of attention take them; int32, on the device."""

    rope: tuple[Any, Any, Any]  # cos and sin, float32 (rows, head_dim / 2), and a row per token
    slots: Any  # (num_tokens): where each token's key and value go
    sequences: tuple[Any, Any, Any]  # block_tables, seq_lens, cu_seqlens_q


class Narrowed(NamedTuple):
    """What `decoder_stack` goes on with for some of the tokens; fields as its arguments."""

    activations: Activations
    sequences: tuple[Any, Any, Any]  # block_tables, seq_lens, cu_seqlens_q
    linear: Callable[..., Any]


@dataclass(slots=True)
class Activations:
    """What a step computes on its way; every layer writes the same arrays again."""

    residual: Any  # (num_tokens, dim): x in the paper, the stream that sublayers add to
    x: Any  # (num_tokens, dim): normalized, the input of a sublayer
    sublayer: Any  # (num_tokens, dim): the result of a sublayer
    qkv: Any  # (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
    query: Any  # (num_tokens, n_heads, head_dim): rotated
    attended: Any  # (num_tokens, n_heads, head_dim)
    attended_rows: Any  # (num_tokens, n_heads * head_dim): the same memory
    lse: Any  # (num_tokens, n_heads) float32: log-sum-exp of the scores, which nobody reads
    gate_up: Any  # (num_tokens, 2 * hidden_dim)
    hidden: Any  # (num_tokens, hidden_dim)

    @staticmethod
    def widths(config: ModelConfig) -> dict[str, int]:
        """Return the elements per token of each array, by name."""
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        return {
            "residual": config.dim,
            "x": config.dim,
            "sublayer": config.dim,
            "qkv": q_dim + 2 * kv_dim,
            "query": q_dim,
            "attended": q_dim,
            "lse": config.n_heads,
            "gate_up": 2 * config.hidden_dim,
            "hidden": config.hidden_dim,
        }

    @classmethod
    def written(cls, config: ModelConfig) -> int:
        """Return how many float32 values per token a prompt's step writes to memory.

        All layers but the last share what `ops.decoder_layer` keeps. The last one computes its MLP
        for the few tokens that have logits; of its other arrays, some as few, the huge pages are
        touched.
        """
        widths = cls.widths(config)
        last = sum(width for name, width in widths.items() if name not in ("gate_up", "hidden"))
        return last + widths["x"] + widths["qkv"] + max(widths["query"], widths["hidden"])

    @classmethod
    def over(cls, config: ModelConfig, arrays: Mapping[str, Any]) -> Activations:
        """View arrays (num_tokens, width), by the names of `widths`, as the operators take them."""
        heads = (arrays["query"].shape[0], config.n_heads, config.head_dim)
        by_head = {name: arrays[name].reshape(*heads) for name in ("query", "attended")}
        return cls(**{**arrays, **by_head}, attended_rows=arrays["attended"])

    def of(self, tokens: Array) -> Activations:
        """Return activations for these tokens, with their residual and query; NumPy only.

        Args:
            tokens: (count,) indices. What the other arrays hold is undefined: they are the first
                `count` rows of the same memory.
        """
        count = len(tokens)
        rows = {name: getattr(self, name)[:count] for name in self.__slots__}
        return Activations(
            **{**rows, "residual": self.residual[tokens], "query": self.query[tokens]}
        )


# Weights of one dtype, and their columns of the result; None: all.
Run = tuple[tuple[Weight, ...], slice | None]


class Projection(NamedTuple):
    """Weights that multiply one input; their results stand side by side."""

    layer: int
    names: tuple[str, ...]  # fields of `LayerWeights`
    runs: list[Run]
    bias: Array | None = None  # (sum of their rows) float32


class Layer(NamedTuple):
    """One layer's weights, those of one input together."""

    attention_norm: Array
    qkv_proj: Projection
    o_proj: Projection
    mlp_norm: Array
    gate_up_proj: Projection
    down_proj: Projection


class Llama:
    """The decoder on the CPU; it holds weights and no sequence's state.

    A call takes scratch memory of its own, which is kept for later calls: threads may run the model
    side by side, on caches or blocks of their own.
    """

    kv_cache_type = KVCache
    applies_adapters = True  # of single requests: `Batch.adapted`
    gives_hidden_states = True

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """Take the weights as they lie; nothing is copied."""
        self.config = config
        self.weights = weights
        self.rope = RotaryEmbedding(config)
        biases = weights.biases or ({},) * config.n_layers
        self.layers = [
            _layer(i, layer, its)
            for i, (layer, its) in enumerate(zip(weights.layers, biases, strict=True))
        ]
        self._whole = [
            _as_one_call(layer, its) for layer, its in zip(weights.layers, biases, strict=True)
        ]
        self._unused: list[_Scratch] = []  # one per thread that has run the model at a time

    def forward(self, batch: Batch, kv_cache: KVCache) -> Array:
        """Compute one step: write the tokens' keys and values, and return the logits asked for.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: those blocks.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        scratch = self._take_scratch()
        a = scratch.activations(len(batch.token_ids))
        wanted = batch.wanted()
        a = self._through_layers(a, batch, kv_cache, wanted=wanted)
        x, adapted = self._normalized(a, wanted or batch)
        logits = ops.linear(x, self.weights.lm_head)
        for adapter, rows in adapted:
            adapter.project(x, rows, logits)
        self._unused.append(scratch)
        return logits

    def hidden_states(self, batch: Batch, kv_cache: KVCache, *, last_only: bool = False) -> Array:
        """Compute one step: write the tokens' keys and values, and return what layers pass on.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: those blocks.
            last_only: return only the last of the states.

        Returns:
            (n_layers + 1, num_tokens, dim) float32: the embeddings, the residual stream after each
            layer but the last, and after the last one normalised, as the head takes it.
        """
        scratch = self._take_scratch()
        a = scratch.activations(len(batch.token_ids))
        count = 1 if last_only else self.config.n_layers + 1
        states = np.empty((count, *a.residual.shape), np.float32)

        def watch(i: int) -> None:
            states[i] = a.residual

        self._through_layers(a, batch, kv_cache, None if last_only else watch)
        every = replace(batch, logit_rows=np.arange(len(batch.token_ids)))
        states[-1], _ = self._normalized(a, every)
        self._unused.append(scratch)
        return states

    def _take_scratch(self) -> _Scratch:
        try:
            return self._unused.pop()
        except IndexError:
            return _Scratch(self.config)

    def _through_layers(
        self,
        a: Activations,
        batch: Batch,
        kv_cache: KVCache,
        watch: Callable[[int], None] | None = None,
        wanted: Wanted | None = None,
    ) -> Activations:
        step = StepArrays(
            self.rope.lookup(batch.positions, batch.rope_lengths),
            batch.slot_mapping,
            (batch.block_tables, batch.seq_lens, batch.cu_seqlens_q),
        )

        def narrow(a: Activations) -> Narrowed:
            sequences = batch.block_tables, batch.seq_lens, wanted.cu_seqlens_q
            return Narrowed(a.of(wanted.tokens), sequences, _linear_with(wanted.adapted))

        ops.embedding(batch.token_ids, self.weights.embedding, out=a.residual)
        for adapter, rows in batch.adapted:
            adapter.embed(batch.token_ids, rows, a.residual)
        first = 0
        if watch is None and not batch.adapted:
            first = self._through_whole_layers(a, step, kv_cache)
        return decoder_stack(
            ops,
            _linear_with(batch.adapted),
            self.layers[first:],
            self.config,
            a,
            step,
            kv_cache.layers[first:],
            watch,
            None if wanted is None else narrow,
        )

    def _through_whole_layers(self, a: Activations, step: StepArrays, kv_cache: KVCache) -> int:
        """Take the stream through layers that are one call each, but the last; return how many.

        The bits are those of `decoder_stack`, whose sums of a long prompt go through memory more
        often, and whose nine calls a layer cost a step of SmolLM2-135M 0.8 ms (AMD EPYC, Zen 4).
        """
        residual, config = a.residual, self.config
        for i in range(config.n_layers - 1):
            weights = self._whole[i]
            if weights is None:
                return i
            ops.decoder_layer(
                residual,
                *weights,
                *step.rope,
                *kv_cache.layers[i],
                step.slots,
                *step.sequences,
                eps=config.norm_eps,
                interleaved=config.rope_interleaved,
                out=residual,
            )
        return config.n_layers - 1

    def _normalized(
        self, a: Activations, batch: Batch | Wanted
    ) -> tuple[Array, list[tuple[Any, Array]]]:
        """Return what the head takes, (num_logits, dim), and which rows are of adapters."""
        sublayer, residual, rows = a.sublayer, a.residual, batch.logit_rows
        if not np.array_equal(rows, np.arange(len(residual))):
            sublayer, residual = sublayer[rows], residual[rows]
        x, stream = ops.add_rms_norm(sublayer, residual, self.weights.norm, self.config.norm_eps)
        places = [(one, np.flatnonzero(np.isin(rows, tokens))) for one, tokens in batch.adapted]
        adapted = [(one, its) for one, its in places if len(its)]
        for adapter, its in adapted:
            adapter.normalize(stream, its, self.config.norm_eps, x)
        return x, adapted


class _Scratch:
    """Memory of the activations of one step at a time; it only ever grows."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._memory = np.empty(0, np.float32)
        self._activations: Activations | None = None

    def activations(self, num_tokens: int) -> Activations:
        """Return activations for `num_tokens` tokens, the last step's where they have the size."""
        if self._activations is None or len(self._activations.x) != num_tokens:
            widths = Activations.widths(self._config)
            needed = num_tokens * sum(widths.values())
            if self._memory.size < needed:
                self._activations = None  # frees the old memory first
                self._memory = np.empty(needed, np.float32)
            ends = itertools.accumulate(num_tokens * width for width in widths.values())
            arrays = {
                name: self._memory[end - num_tokens * width : end].reshape(num_tokens, width)
                for (name, width), end in zip(widths.items(), ends, strict=True)
            }
            self._activations = Activations.over(self._config, arrays)
        return self._activations


def _layer(i: int, weights: LayerWeights, biases: Mapping[str, Array]) -> Layer:
    def projection(*names: str) -> Projection:
        members = {name: getattr(weights, name) for name in names}
        return Projection(i, names, _runs(*members.values()), joined_biases(members, biases))

    return Layer(
        weights.attention_norm,
        projection("q_proj", "k_proj", "v_proj"),
        projection("o_proj"),
        weights.mlp_norm,
        projection("gate_proj", "up_proj"),
        projection("down_proj"),
    )


def _as_one_call(weights: LayerWeights, biases: Mapping[str, Array]) -> tuple[Weight, ...] | None:
    """Return a layer's weights as `ops.decoder_layer` takes them, or None where it does not."""
    attention = weights.q_proj, weights.k_proj, weights.v_proj
    mlp = weights.gate_proj, weights.up_proj
    if biases or len(_runs(*attention)) > 1 or len(_runs(*mlp)) > 1:
        return None
    return tuple(getattr(weights, field.name) for field in fields(weights))


def joined_biases(members: Mapping[str, Weight], biases: Mapping[str, Array]) -> Array | None:
    """Return the biases of projections side by side, in float32.

    Args:
        members: the projections by name.
        biases: of those that have one; the others get zeros.

    Returns:
        (sum of their rows); None where no projection has one.
    """
    if not members.keys() & biases.keys():
        return None
    zeros = {name: np.zeros(weight.shape[0], np.float32) for name, weight in members.items()}
    return np.concatenate([biases.get(name, zero) for name, zero in zeros.items()]).astype(
        np.float32
    )


def _runs(*weights: Weight) -> list[Run]:
    """Group neighbours of one dtype, which `linear` takes in one pass.

    A GGUF file may hold a layer's values in more bits than its queries and keys.
    """
    runs, begin = [], 0
    for _, run in itertools.groupby(weights, key=lambda weight: str(weight.dtype)):
        members = tuple(run)
        end = begin + sum(weight.shape[0] for weight in members)
        runs.append((members, slice(begin, end)))
        begin = end
    return runs if len(runs) > 1 else [(weights, None)]


def _linear(x: Array, projection: Projection, out: Array) -> None:
    """Multiply x by a projection's weights, into (num_tokens, sum of their rows)."""
    for weights, columns in projection.runs:
        ops.linear(x, weights, out=out if columns is None else out[:, columns])
    if projection.bias is not None:
        np.add(out, projection.bias, out=out)


def _linear_with(adapted: Sequence[tuple[Any, Array]]) -> Callable[..., None]:
    """Return `_linear` with what the adapters of some requests add to it."""
    if not adapted:
        return _linear

    def linear(x: Array, projection: Projection, out: Array) -> None:
        _linear(x, projection, out)
        for adapter, rows in adapted:
            adapter.add(projection.layer, projection.names, x, rows, out)

    return linear
