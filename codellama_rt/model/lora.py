"""LoRA adapters (arXiv:2106.09685) in PEFT's format: merged into weights, or applied to requests.

A projection W becomes W + scale * B A. Applied to a request, the two thin products are added to the
rows of its own tokens alone, so requests with several adapters and without any share a step, and
no bit of one depends on another: each row of `ops.linear` is a function of that row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from codellama_rt import ops
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.interface import Decoder
from codellama_rt.model.weights import LlamaWeights, layer_shapes

Array = np.ndarray


@dataclass(frozen=True)
class LowRank:
    """One projection's change: x -> up (down x)."""

    down: Array  # (rank, in_features) float32
    up: Array  # (out_features, rank) float32, times the scale


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """The changes of all layers.

    Attributes:
        path: where it lies.
        layers: for each layer, the changed projections by name ("q_proj", ...).
        widths: of every projection the out_features.
    """

    path: Path
    layers: list[dict[str, LowRank]] = field(repr=False)
    widths: Mapping[str, int] = field(repr=False)

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
                thin = ops.linear(x[rows], change.down)
                out[rows, begin:end] += ops.linear(thin, change.up)
            begin = end


def check_adapter(adapter: object, model: Decoder) -> None:
    """Reject what is not an adapter for a model.

    Raises:
        TypeError: not a LoraAdapter.
        ValueError: it was loaded for another shape, or this model applies adapters to no request.
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
    config = model.config
    if len(adapter.layers) != config.n_layers or adapter.widths != projection_widths(config):
        raise ValueError(f"{adapter.path}: this adapter was loaded for a model of another shape")


def merged(weights: LlamaWeights, adapter: LoraAdapter) -> LlamaWeights:
    """Return weights with an adapter's changes in them, rounded to the weights' own dtype.

    Raises:
        ValueError: a projection that it changes is quantised.
    """
    layers = []
    for layer, changes in zip(weights.layers, adapter.layers, strict=True):
        changed = {}
        for name, change in changes.items():
            weight = getattr(layer, name)
            if not isinstance(weight, np.ndarray):
                raise ValueError(
                    f"{adapter.path}: an adapter is merged into float weights only, and {name} is "
                    "quantised; apply it to requests instead (llm.load_adapter)"
                )
            total = weight.astype(np.float32) + change.up @ change.down
            changed[name] = total.astype(weight.dtype)
        layers.append(replace(layer, **changed))
    return replace(weights, layers=layers)


def projection_widths(config: ModelConfig) -> dict[str, int]:
    """Return out_features of the projections of a layer."""
    return {name: shape[0] for name, shape in layer_shapes(config).items() if len(shape) == 2}
