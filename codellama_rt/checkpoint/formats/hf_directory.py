"""Hugging Face checkpoint directories: config.json and weights, in one file or in shards.

`convert` writes such a directory as well: one file, with some tensors in int8 or int4.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.generation_config import read_generation_config
from codellama_rt.checkpoint.formats.gptq_awq import join_packed, read_packed_kind, with_own_file
from codellama_rt.checkpoint.formats.packed_weights import read_config_section, unpack
from codellama_rt.checkpoint.formats.safetensors import read_safetensors, read_safetensors_file
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.stored_tensor import StoredModel, StoredTensor
from codellama_rt.checkpoint.tensor_names import HEAD, is_recomputed
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BIN = "pytorch_model.bin"  # what torch.save wrote, before safetensors
_BIN_INDEX = "pytorch_model.bin.index.json"


def read_directory(path: Path) -> StoredModel:
    """Open a directory in the layout of Hugging Face's transformers.

    Args:
        path: a directory with config.json and model.safetensors, or shards and their index; or the
            same files as torch.save wrote them, pytorch_model.bin.

    Returns:
        The model; no weight has been read.

    Raises:
        CheckpointError: a file is missing or rejected, or the index disagrees with the shards.
    """
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path}: expected config.json and {_SINGLE}, found {_what_is_there(path)}"
        )
    source = str(path / "config.json")
    values = with_own_file(read_object(path / "config.json"), path)
    quantization = read_config_section(values, source)
    packed = read_packed_kind(values, source)
    if quantization is not None or packed is not None:
        values.pop("quantization_config")
    config = ModelConfig.from_hf(values, source)
    if quantization is not None:
        file = path / _SINGLE
        tensors = unpack(file, *read_safetensors_file(file))
    else:
        tensors = _read_tensors(path)
    if packed is not None:
        tensors = join_packed(path, tensors, packed, config.biased)
    return StoredModel(
        path,
        config,
        tensors,
        read_generation_config(path, config.vocab_size),
        quantization=quantization,
    )


def has_weights(path: Path) -> bool:
    """Return whether a directory has weights in this layout."""
    return any((path / name).exists() for name in (_SINGLE, _INDEX, _BIN, _BIN_INDEX))


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the first of the files there are; transformers, too, prefers one to an index."""
    if (path / _SINGLE).exists():
        return read_safetensors(path / _SINGLE)
    if (path / _INDEX).exists():
        return _read_shards(path / _INDEX, ".safetensors", read_safetensors)
    if not has_weights(path):
        raise CheckpointError(
            f"{path}: expected {_SINGLE} or {_INDEX}, found {_what_is_there(path)}"
        )
    from codellama_rt.checkpoint.formats.pth import read_pth  # a machine that others never need

    if (path / _BIN).exists():
        return read_pth(path / _BIN)
    return _read_shards(path / _BIN_INDEX, ".bin", read_pth)


def _what_is_there(path: Path) -> str:
    """Describe a directory without usable weights, and the remedy."""
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty directory"
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    for suffix, index in ((".safetensors", _INDEX), (".bin", _BIN_INDEX)):
        if any(name.endswith(suffix) for name in names):
            return f"{found}; shards need their {index}"
    return found


def _read_shards(
    index_path: Path, suffix: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map: expected an object of tensor names and files, found "
            f"{weight_map!r:.200}"
        )
    tensors: dict[str, StoredTensor] = {}
    names = [_shard_name(index_path, suffix, item) for item in weight_map.items()]
    for shard_name in dict.fromkeys(names):
        shard = read(index_path.with_name(shard_name))
        for name, tensor in shard.items():
            if name in tensors:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r}: expected it in one shard, "
                    f"found it in {tensors[name].file.name} as well"
                )
            tensors[name] = tensor
    _check_index(index_path, weight_map, tensors)
    return tensors


def _shard_name(index_path: Path, suffix: str, item: tuple[str, Any]) -> str:
    """Check that a shard is a plain file name: an index must not point outside its directory."""
    name, file = item
    if (
        not isinstance(file, str)
        or not file.endswith(suffix)
        or Path(file).name != file
        or "\0" in file
    ):
        raise CheckpointError(
            f"{index_path}: tensor {name!r}: expected the name of a {suffix} file beside the "
            f"index, found {file!r:.200}"
        )
    return file


def _check_index(
    index_path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors and (name == HEAD or is_recomputed(name)):
            continue  # of a tied head, or rotary tables, some indexes speak without their bytes
        found = tensors[name].file.name if name in tensors else "no shard"
        if found != file:
            raise CheckpointError(
                f"{index_path}: tensor {name!r}: expected it in {file}, found it in {found}"
            )
    for name, tensor in tensors.items():
        if name not in weight_map and not is_recomputed(name):
            raise CheckpointError(
                f"{index_path}: tensor {name!r}: expected only tensors of the index in "
                f"{tensor.file.name}, "
                "found this one beside them"
            )
