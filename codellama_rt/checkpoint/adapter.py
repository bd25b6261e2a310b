"""LoRA adapters as PEFT's `save_pretrained` writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from codellama_rt.checkpoint.adapter_config import AdapterConfig
from codellama_rt.checkpoint.adapter_modules import AdapterModule, AdapterReader, Place
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.stored_tensor import StoredTensor, mapped_files
from codellama_rt.checkpoint.tensor_names import place_of
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.lora import LoraAdapter
from codellama_rt.model.weights import LlamaWeights

_PARTS = {  # with the adapter's name in them, as old versions of PEFT wrote it, or without
    "lora_A": r"lora_A(\.\w+)?\.weight",
    "lora_B": r"lora_B(\.\w+)?\.weight",
    "lora_B.bias": r"lora_B(\.\w+)?\.bias",
    "lora_embedding_A": r"lora_embedding_A(\.\w+)?",
    "lora_embedding_B": r"lora_embedding_B(\.\w+)?",
    "lora_magnitude_vector": r"lora_magnitude_vector(\.\w+)?(\.weight)?",
    "trainable_tokens": r"token_adapter\.trainable_tokens_delta(\.\w+)?",
    "weight": r"((base_layer|modules_to_save(\.\w+)?)\.)?weight",
    "bias": r"((base_layer|modules_to_save(\.\w+)?)\.)?bias",
    "original": r"original_module\.(weight|bias)",  # of the base model, beside modules_to_save
}
_MODULE = re.compile(
    r"(?:base_model\.model\.)?((?:model\.)?(?:layers\.\d+\.)?[a-z_]+(?:\.\w+_proj)?)"
)
_MAX_NAME = 500


def load_adapter(
    path: str | os.PathLike[str], config: ModelConfig, weights: LlamaWeights | None = None
) -> LoraAdapter:
    """Read adapter_config.json and adapter_model.safetensors, or .bin, of a directory.

    Args:
        path: a directory written by PEFT's save_pretrained.
        config: of the adapter's model.
        weights: of that model, which DoRA and changed biases are relative to.

    Raises:
        CheckpointError: not a LoRA adapter, one that asks for what is not supported, one for
            another model, or a file that is written while it is read.
    """
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: expected a directory with adapter_config.json, found none")
    file, tensors = _read_tensors(path)
    asked = AdapterConfig(path / "adapter_config.json")
    reader = AdapterReader(file, asked, config, weights)
    for place, module in _modules(file, tensors, config).items():
        reader.read(place, module)
    mapped_files(tensors.values()).check()  # all is copied by now, and the file may be replaced
    return reader.adapter(path)


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


def _modules(
    file: Path, tensors: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[Place, AdapterModule]:
    """Group the tensors by module."""
    found: dict[Place, AdapterModule] = {}
    for name, tensor in tensors.items():
        match = _MODULE.match(name) if len(name) <= _MAX_NAME else None
        kinds = [k for k, rest in _PARTS.items() if match and _rest(name, match, rest)]
        if match is None or not kinds or tensor.float_dtype is None:
            raise CheckpointError(
                f"{file}: tensor {name[:_MAX_NAME]!r}: expected float lora_A, lora_B or another "
                "part of a module"
            )
        place = place_of(match[1])
        if place is None or (place[0] or 0) >= config.n_layers:
            raise CheckpointError(f"{file}: {match[1]}: expected a projection of the model")
        parts = found.setdefault(place, AdapterModule(match[1])).parts
        if kinds[0] in parts:
            raise CheckpointError(f"{file}: {match[1]}: expected one {kinds[0]}, found two")
        parts[kinds[0]] = tensor
    if not found:
        raise CheckpointError(f"{file}: expected tensors, found none")
    return found


def _rest(name: str, match: re.Match[str], expression: str) -> bool:
    return re.fullmatch(rf"\.{expression}", name[match.end() :], re.ASCII) is not None
