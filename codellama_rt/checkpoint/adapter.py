"""LoRA adapters as PEFT's `save_pretrained` writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.finiteness import require_finite
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.stored_tensor import StoredTensor, mapped_files
from codellama_rt.checkpoint.tensor_names import pairs_first
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.model.lora import LoraAdapter, LowRank, projection_widths
from codellama_rt.model.weights import layer_shapes

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:model\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    r"(?P<projection>\w+))\.lora_(?P<side>[AB])(?:\.\w+)?\.weight"
)
_REFUSED = {  # PEFT's options that would change the result and are not supported
    "use_dora": "DoRA",
    "modules_to_save": "whole modules",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias",
}
_MAX_RANK = 4096


def load_adapter(path: str | os.PathLike[str], config: ModelConfig) -> LoraAdapter:
    """Read adapter_config.json and adapter_model.safetensors, or .bin, of a directory.

    Args:
        path: a directory written by PEFT's save_pretrained.
        config: of the adapter's model.

    Raises:
        CheckpointError: not a LoRA adapter, one with anything but low-rank changes of
            projections, one for another model, or a file that is written while it is read.
    """
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: expected a directory with adapter_config.json, found none")
    fields = ConfigFields(
        read_object(path / "adapter_config.json"), str(path / "adapter_config.json")
    )
    _check_kind(fields)
    file, tensors = _read_tensors(path)
    widths = projection_widths(config)
    inputs = {name: shape[-1] for name, shape in layer_shapes(config).items()}
    layers: list[dict[str, LowRank]] = [{} for _ in range(config.n_layers)]
    for (module, layer, name), sides in _pairs(file, tensors).items():
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
    mapped_files(tensors.values()).check()  # all is copied by now, and the file may be replaced
    return LoraAdapter(path, layers, widths)


def _read_tensors(path: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """Return the file with the weights, and its tensors."""
    file = path / "adapter_model.safetensors"
    if file.is_file():
        return file, read_safetensors(file)
    old = path / "adapter_model.bin"
    if not old.is_file():
        raise CheckpointError(f"{path}: expected {file.name} or {old.name}, found neither")
    from codellama_rt.checkpoint.formats.pth import read_pth  # a machine that others never need

    return old, read_pth(old)


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
    """Group the tensors by (module, layer, projection), then by side."""
    found: dict[tuple[str, int, str], dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.float_dtype is None:
            raise CheckpointError(
                f"{file}: tensor {name!r}: expected float lora_A or lora_B of a projection"
            )
        key = match["module"], int(match["layer"]), match["projection"]
        found.setdefault(key, {})[match["side"]] = tensor
    if not found:
        raise CheckpointError(f"{file}: expected tensors, found none")
    return found


def _read(
    file: Path,
    sides: Mapping[str, StoredTensor],
    side: str,
    shape: tuple[int | None, ...],
    module: str,
) -> np.ndarray:
    if side not in sides:
        raise CheckpointError(f"{file}: {module}: expected lora_A and lora_B, found no lora_{side}")
    found = sides[side].shape
    pairs = zip(shape, found, strict=True)
    if len(found) != 2 or not all(wanted in (None, size) for wanted, size in pairs):
        words = ", ".join("rank" if size is None else str(size) for size in shape)
        raise CheckpointError(f"{file}: {module}.lora_{side}: expected ({words}), found {found}")
    array = sides[side].decode(0, found[0]).astype(np.float32)
    require_finite(array, f"{file}: {module}.lora_{side}")
    return array


def _scale(fields: ConfigFields, module: str, rank: int) -> float:
    """Return alpha / rank; with rsLoRA (arXiv:2312.03732) alpha / sqrt(rank)."""
    alpha = fields.number("lora_alpha")
    patterns = fields.values.get("alpha_pattern") or {}
    for pattern, value in _items(fields, patterns):
        # PEFT matches a pattern against the end of a module's name.
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
