"""LoRA adapters (arXiv:2106.09685) in PEFT's format: merged into weights, or applied to requests.

A projection W becomes W + scale * B A; with DoRA (arXiv:2402.09353) each of its rows is then scaled
to a length of the adapter's. Applied to a request, the two thin products are added to the rows of
its own tokens alone, so requests with several adapters and without any share a step, and no bit of
one depends on another: each row of `ops.linear` is a function of that row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt import ops
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ATTENTION_BIASES, MLP_BIASES, ModelConfig
from codellama_rt.model.interface import Decoder
from codellama_rt.model.weights import LlamaWeights, layer_shapes

Array = np.ndarray
_TOP = ("embedding", "norm", "lm_head")  # modules outside of the layers


@dataclass(frozen=True)
class LowRank:
    """One module's change: its result y becomes factor * y + up (down x) + shift."""

    down: Array | None = None  # (rank, in_features) float32; embedding: (vocab_size, rank), rows
    up: Array | None = None  # (out_features, rank) float32, times the scale and the factor
    factor: Array | None = None  # (out_features) float32 of DoRA
    shift: Array | None = None  # (out_features) float32 of biases

    def apply(self, thin: Array | None, rows: Array, out: Array) -> None:
        """Change the rows of an adapter's tokens.

        Args:
            thin: (count, rank) float32, what `down` gives for these rows; None without one.
            rows: (count,) which.
            out: (num_tokens, out_features) float32; written.
        """
        y = out[rows]
        if self.factor is not None:
            y *= self.factor
        if self.up is not None:
            y += ops.linear(thin, self.up)
        if self.shift is not None:
            y += self.shift
        out[rows] = y

    def apply_to_product(self, x: Array, rows: Array, out: Array) -> None:
        """Change what a projection made of the rows of x, (num_tokens, in_features) float32."""
        thin = None if self.down is None else ops.linear(x[rows], self.down)
        self.apply(thin, rows, out)


@dataclass(frozen=True)
class TokenRows:
    """Other embeddings of some tokens; a tied head has them too."""

    ids: Array  # (count,) int64, ascending
    values: Array  # (count, dim)

    def apply(self, token_ids: Array, rows: Array, out: Array) -> None:
        """Replace the embeddings, (num_tokens, dim), of those tokens among some rows."""
        places = np.searchsorted(self.ids, token_ids[rows])
        found = self.ids[np.minimum(places, len(self.ids) - 1)] == token_ids[rows]
        out[rows[found]] = self.values[places[found]]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """The changes of all layers, and of what is around them.

    Attributes:
        path: where it lies.
        layers: for each layer, the changed projections by name ("q_proj", ...).
        widths: of every projection the out_features.
        top: the changes of "embedding" and "lm_head".
        whole: modules that the adapter replaces: (layer, None outside of them; field) to array.
        tokens: the embeddings that it replaces.
        tied: whether a head that is the embedding follows the latter.
    """

    path: Path
    layers: list[dict[str, LowRank]] = field(repr=False)
    widths: Mapping[str, int] = field(repr=False)
    top: Mapping[str, LowRank] = field(default_factory=dict, repr=False)
    whole: Mapping[tuple[int | None, str], Array] = field(default_factory=dict, repr=False)
    tokens: TokenRows | None = field(default=None, repr=False)
    tied: bool = field(default=False, repr=False)

    def add(self, layer: int, projections: tuple[str, ...], x: Array, rows: Array, out: Array):
        """Add this adapter's part to the rows of its tokens.

        Args:
            layer: which.
            projections: those whose results stand side by side in `out`.
            x: (num_tokens, in_features) float32.
            rows: (count,) the adapter's tokens.
            out: (num_tokens, sum of widths) float32; written.
        """
        begin = 0
        for name in projections:
            end = begin + self.widths[name]
            change = self.layers[layer].get(name)
            if change is not None:
                change.apply_to_product(x, rows, out[:, begin:end])
            begin = end

    def embed(self, token_ids: Array, rows: Array, out: Array) -> None:
        """Change the embeddings of this adapter's tokens.

        Args:
            token_ids: (num_tokens,) int32.
            rows: (count,) the adapter's tokens.
            out: (num_tokens, dim) float32; written.
        """
        table, change = self.whole.get((None, "embedding")), self.top.get("embedding")
        if table is not None:
            out[rows] = ops.embedding(token_ids[rows], table)
        if self.tokens is not None:
            self.tokens.apply(token_ids, rows, out)
        if change is not None:
            thin = None if change.down is None else ops.embedding(token_ids[rows], change.down)
            change.apply(thin, rows, out)

    def normalize(self, stream: Array, rows: Array, eps: float, out: Array) -> None:
        """Normalise some rows of the residual stream by the adapter's weight, if it has one."""
        norm = self.whole.get((None, "norm"))
        if norm is not None:
            out[rows] = ops.rms_norm(stream[rows], norm, eps)

    def project(self, x: Array, rows: Array, logits: Array) -> None:
        """Change the logits of some rows.

        Args:
            x: (num_logits, dim) float32, what the head takes.
            rows: (count,) the adapter's.
            logits: (num_logits, vocab_size) float32; written.
        """
        head, change = self.whole.get((None, "lm_head")), self.top.get("lm_head")
        if head is not None:
            logits[rows] = ops.linear(x[rows], head)
        if self.tokens is not None and self.tied:
            logits[np.ix_(rows, self.tokens.ids)] = ops.linear(x[rows], self.tokens.values)
        if change is not None:
            change.apply_to_product(x, rows, logits)


def require_applicable(adapter: LoraAdapter) -> None:
    """Reject an adapter that can only be merged.

    Raises:
        CheckpointError: it replaces norms or projections inside the layers.
    """
    inside = sorted(f"layers.{i}.{name}" for i, name in adapter.whole if i is not None)
    if inside:
        raise CheckpointError(
            f"{adapter.path}: replaces whole modules of layers ({inside[0]} and others), which "
            "single requests cannot; merge it with LLM(adapter=...)"
        )


def check_adapter(adapter: object, model: Decoder) -> None:
    """Reject what is not an adapter for a model.

    Raises:
        TypeError: not a LoraAdapter.
        ValueError: it was loaded for another shape, this model applies adapters to no request, or
            it can only be merged.
    """
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(
            f"adapter must be a LoraAdapter from load_adapter, got {type(adapter).__name__}"
        )
    if not model.applies_adapters:
        raise ValueError(
            "adapters of single requests need device='cpu' and runtime='direct'; elsewhere merge "
            "one into the weights with LLM(adapter=...)"
        )
    require_applicable(adapter)
    config = model.config
    if len(adapter.layers) != config.n_layers or adapter.widths != projection_widths(config):
        raise ValueError(f"{adapter.path}: this adapter was loaded for a model of another shape")


def merged(weights: LlamaWeights, adapter: LoraAdapter) -> LlamaWeights:
    """Return weights with an adapter's changes in them, rounded to the weights' own dtype.

    Raises:
        ValueError: a module that it changes is quantised, a sum is beyond its dtype, or the head
            would have a bias.
    """
    layers, biases = [], []
    for i, (layer, changes) in enumerate(zip(weights.layers, adapter.layers, strict=True)):
        whole = {name: array for (its, name), array in adapter.whole.items() if its == i}
        touched = {*whole, *(name for name, change in changes.items() if change.up is not None)}
        changed = {
            name: _merged(adapter, name, getattr(layer, name), whole.get(name), changes.get(name))
            for name in touched
        }
        layers.append(replace(layer, **changed))
        biases.append(_merged_biases(weights.biases[i] if weights.biases else {}, changes))
    top = _merged_top(weights, adapter)
    return replace(weights, layers=layers, biases=_in_all_layers(biases, adapter.widths), **top)


def merged_config(config: ModelConfig, weights: LlamaWeights, adapter: LoraAdapter) -> ModelConfig:
    """Return the configuration of the weights that `merged` gave for an adapter."""
    unties = {*adapter.top, *(name for layer, name in adapter.whole if layer is None)} - {"norm"}
    return replace(
        config,
        tie_word_embeddings=config.tie_word_embeddings and not unties,
        biased=tuple(
            name for name in adapter.widths if any(name in layer for layer in weights.biases)
        ),
    )


def _merged_top(weights: LlamaWeights, adapter: LoraAdapter) -> dict[str, Array]:
    changed = {}
    for name in _TOP:
        whole, change = adapter.whole.get((None, name)), adapter.top.get(name)
        has_tokens = name == "embedding" or (name == "lm_head" and adapter.tied)
        tokens = adapter.tokens if has_tokens else None
        if name == "lm_head" and tokens is not None and weights.lm_head is weights.embedding:
            changed[name] = changed["embedding"]
        elif any(one is not None for one in (whole, change, tokens)):
            changed[name] = _merged(adapter, name, getattr(weights, name), whole, change, tokens)
    return changed


def _merged(
    adapter: LoraAdapter,
    name: str,
    weight: Any,
    whole: Array | None,
    change: LowRank | None,
    tokens: TokenRows | None = None,
) -> Array:
    if not isinstance(weight, np.ndarray):
        raise ValueError(
            f"{adapter.path}: an adapter is merged into float weights only, and {name} is "
            "quantised; apply it to requests instead (llm.load_adapter)"
        )
    if name in _TOP and change is not None and change.shift is not None:
        raise ValueError(
            f"{adapter.path}: the adapter has a bias for {name}, and the model has no place for "
            "one; apply it to requests instead (llm.load_adapter)"
        )
    total = np.array(weight if whole is None else whole, np.float32)
    if tokens is not None:
        total[tokens.ids] = tokens.values
    if change is not None:
        by_row = total.T if name == "embedding" else total
        if change.factor is not None:
            by_row *= change.factor[:, None]
        if change.up is not None:
            by_row += change.up @ (change.down.T if name == "embedding" else change.down)
    with np.errstate(over="ignore"):
        result = total.astype(weight.dtype)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{adapter.path}: {name} with the adapter is beyond the range of {weight.dtype}; use "
            "dtype='float32' or 'bfloat16'"
        )
    return result


def _merged_biases(biases: Mapping[str, Array], changes: Mapping[str, LowRank]) -> dict[str, Array]:
    """Return a layer's biases, as factor * bias + shift where the adapter says something."""
    result = dict(biases)
    for name, change in changes.items():
        bias = biases.get(name)
        if change.shift is None and (bias is None or change.factor is None):
            continue
        total = np.float32(0) if bias is None else bias.astype(np.float32)
        total = total * (1 if change.factor is None else change.factor)
        total = total + (0 if change.shift is None else change.shift)
        result[name] = total.astype(np.float32 if bias is None else bias.dtype)
    return result


def _in_all_layers(
    biases: list[dict[str, Array]], widths: Mapping[str, int]
) -> tuple[dict[str, Array], ...]:
    """Return biases of zeros besides: all of attention have one or none, as config.json says it."""
    present = {name for layer in biases for name in layer}
    groups = (group for group in (ATTENTION_BIASES, MLP_BIASES) if present & {*group})
    zeros = {name: np.zeros(widths[name], np.float32) for group in groups for name in group}
    return tuple({**zeros, **layer} for layer in biases) if zeros else ()


def projection_widths(config: ModelConfig) -> dict[str, int]:
    """Return out_features of the projections of a layer."""
    return {name: shape[0] for name, shape in layer_shapes(config).items() if len(shape) == 2}
