"""LoRA adapters (arXiv:2106.09685) in PEFT's format: merged into weights, or applied to requests.

A projection W becomes W + scale * B A. Applied to a request, the two thin products are added to the
rows of its own tokens alone, so requests with several adapters and without any share a step, and
no bit of one depends on another: each row of `ops.linear` is a function of that row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint import LlamaWeights
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.checkpoint.tensor_names import pairs_first
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.config_fields import ConfigFields

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:model\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    r"(?P<projection>\w+))\.lora_(?P<side>[AB])(?:\.\w+)?\.weight"
)
_REFUSED = {  # what would change the result and is not computed, by PEFT's names
    "use_dora": "DoRA", "modules_to_save": "whole modules", "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias",
}  # fmt: skip
_MAX_RANK = 4096

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


def load_adapter(path: str | os.PathLike[str], config: ModelConfig) -> LoraAdapter:
    """Read adapter_config.json and adapter_model.safetensors of a directory.

    Args:
        path: as PEFT's save_pretrained wrote it.
        config: of the model it is for.

    Raises:
        CheckpointError: no LoRA adapter, one with more than low-rank changes of projections, or
            one for another model.
    """
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: expected a directory with adapter_config.json, found none")
    fields = ConfigFields(
        read_object(path / "adapter_config.json"), str(path / "adapter_config.json")
    )
    _check_kind(fields)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{path}: expected {file.name}, found none; pickled adapters are never loaded"
        )
    widths = projection_widths(config)
    inputs = dict.fromkeys(widths, config.dim) | {
        "o_proj": config.n_heads * config.head_dim, "down_proj": config.hidden_dim
    }  # fmt: skip
    layers: list[dict[str, LowRank]] = [{} for _ in range(config.n_layers)]
    for (module, layer, name), sides in _pairs(file, read_safetensors(file)).items():
        if layer >= config.n_layers or name not in widths:
            raise CheckpointError(f"{file}: {module}: expected a projection of the model")
        shapes = {"A": (None, inputs[name]), "B": (widths[name], None)}
        down, up = (_read(file, sides, side, shapes[side], module) for side in "AB")
        if down.shape[0] != up.shape[1] or not 1 <= down.shape[0] <= _MAX_RANK:
            raise CheckpointError(
                f"{file}: {module}: expected one rank up to {_MAX_RANK}, found {down.shape[0]} and "
                f"{up.shape[1]}"
            )
        up *= np.float32(_scale(fields, module, down.shape[0]))
        if name in ("q_proj", "k_proj") and config.rope_interleaved:
            up = pairs_first(up, config.head_dim)
        layers[layer][name] = LowRank(down, np.ascontiguousarray(up))
    return LoraAdapter(path, layers, widths)


def check_adapter(adapter: object, model: Any) -> None:
    """Refuses what is no adapter for a model.

    Raises:
        TypeError: no LoraAdapter.
        ValueError: one for a model of another shape, or a device that applies none.
    """
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(
            f"adapter must be a LoraAdapter from load_adapter, got {type(adapter).__name__}"
        )
    if not getattr(model, "applies_adapters", False):
        raise ValueError(
            "adapters of single requests are applied on the CPU; on another device merge one with "
            "LLM(adapter=...)"
        )
    config = model.config
    if len(adapter.layers) != config.n_layers or adapter.widths != projection_widths(config):
        raise ValueError(f"{adapter.path}: this adapter was loaded for a model of another shape")


def merged(weights: LlamaWeights, adapter: LoraAdapter) -> LlamaWeights:
    """Weights with an adapter's changes in them, rounded to the weights' own dtype.

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
    """out_features of the projections of a layer."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "q_proj": q_dim, "k_proj": kv_dim, "v_proj": kv_dim, "o_proj": config.dim,
        "gate_proj": config.hidden_dim, "up_proj": config.hidden_dim, "down_proj": config.dim,
    }  # fmt: skip


def _check_kind(fields: ConfigFields) -> None:
    if fields.values.get("peft_type") != "LORA":
        raise fields.fault("peft_type", "'LORA'")
    if fields.values.get("bias", "none") != "none":
        raise fields.fault("bias", "'none'")
    for key, what in _REFUSED.items():
        if fields.values.get(key):
            raise fields.fault(key, "nothing", f"{what} are not supported")


def _pairs(
    file: Path, tensors: Mapping[str, StoredTensor]
) -> dict[tuple[str, int, str], dict[str, StoredTensor]]:
    """The tensors by (module, layer, projection), then by side."""
    found: dict[tuple[str, int, str], dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or not tensor.is_float:
            raise CheckpointError(
                f"{file}: tensor {name!r}: expected float lora_A or lora_B of a projection"
            )
        key = match["module"], int(match["layer"]), match["projection"]
        found.setdefault(key, {})[match["side"]] = tensor
    if not found:
        raise CheckpointError(f"{file}: expected tensors, found none")
    return found


def _read(
    file: Path, sides: Mapping[str, StoredTensor], side: str, shape: tuple[int | None, ...],
    module: str,
) -> Array:  # fmt: skip
    if side not in sides:
        raise CheckpointError(f"{file}: {module}: expected lora_A and lora_B, found no lora_{side}")
    found = sides[side].shape
    pairs = zip(shape, found, strict=True)
    if len(found) != 2 or not all(wanted in (None, size) for wanted, size in pairs):
        words = ", ".join("rank" if size is None else str(size) for size in shape)
        raise CheckpointError(f"{file}: {module}.lora_{side}: expected ({words}), found {found}")
    array = sides[side].view().astype(np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{file}: {module}.lora_{side}: expected finite values")
    return array


def _scale(fields: ConfigFields, module: str, rank: int) -> float:
    """alpha / rank; / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    alpha = fields.number("lora_alpha")
    patterns = fields.values.get("alpha_pattern") or {}
    for pattern, value in _items(fields, patterns):
        # PEFT takes a pattern for the end of a module's name.
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = float(value)
    return alpha / (rank**0.5 if fields.flag("use_rslora", False) else rank)


def _items(fields: ConfigFields, patterns: Any) -> Iterator[tuple[str, float]]:
    if not isinstance(patterns, dict):
        raise fields.fault("alpha_pattern", "an object")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.]+", pattern) or type(value) not in (int, float):
            raise fields.fault("alpha_pattern", "names of modules and numbers")
        yield pattern, value
