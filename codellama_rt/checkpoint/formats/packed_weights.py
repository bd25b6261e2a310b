"""Weights in this runtime's int8 and int4 in safetensors files: the format `convert` writes.

Each is a tensor of dtype U8: the bytes of `ops.Quantized`, padded with zeros to a multiple of
`ALIGNMENT`. The file's metadata describes them:

    "codellama_rt.format_version": "2"
    "codellama_rt.quantized": '{"<tensor>": {"dtype": "int4", "shape": [4096, 11008]}, ...}'

and config.json beside it has

    "quantization_config": {"quant_method": "codellama_rt", "format_version": 2, "dtype": "int4"}

Any change to the layout of int8 or int4 weights (csrc/common/quantized.h) needs a new format
version.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import parse_object
from codellama_rt.checkpoint.quantize import QUANTIZATIONS, is_quantized
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.errors import CheckpointError
from codellama_rt.ops.quantized import weight_num_bytes

QUANT_METHOD = "codellama_rt"
FORMAT_VERSION = 2
ALIGNMENT = 64  # bytes: a cache line, so that no vector of a weight crosses one
_VERSION_KEY, _TENSORS_KEY = "codellama_rt.format_version", "codellama_rt.quantized"
_MAX_AXIS = 2**48


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A tensor in int8 or int4 (its `encoding`), used without conversion."""

    @property
    def weight_dtype(self) -> str:
        """The dtype, "int8" or "int4"."""
        return self.encoding


def padded_bytes(dtype: str, shape: tuple[int, int]) -> int:
    """Return the bytes that a weight takes in the file."""
    return -(-weight_num_bytes(dtype, shape) // ALIGNMENT) * ALIGNMENT


def file_metadata(shapes: Mapping[str, tuple[int, int]], dtype: str) -> dict[str, str]:
    """Return the metadata of a file that holds these weights in `dtype`."""
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, shape in shapes.items()}
    return {_VERSION_KEY: str(FORMAT_VERSION), _TENSORS_KEY: json.dumps(tensors)}


def config_section(dtype: str) -> dict[str, Any]:
    """Return the quantization_config of config.json."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "dtype": dtype}


def read_config_section(values: Mapping[str, Any], source: str) -> str | None:
    """Return the quantization that config.json names.

    Args:
        values: config.json.
        source: its path.

    Returns:
        "int8" or "int4"; None if it has no quantization_config, or another program's.

    Raises:
        CheckpointError: an unknown format version or dtype.
    """
    section = values.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return None
    if section.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{source}: quantization_config: expected format_version {FORMAT_VERSION}, found "
            f"{section.get('format_version')!r:.200}; a newer codellama_rt may support it"
        )
    if section.get("dtype") not in QUANTIZATIONS:
        raise CheckpointError(
            f"{source}: quantization_config: expected dtype to be one of "
            f"{', '.join(QUANTIZATIONS)}, found {section.get('dtype')!r:.200}"
        )
    return section["dtype"]


def unpack(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """Replace the raw tensors of quantised weights by what the file's metadata describes.

    Args:
        path: the safetensors file.
        tensors: the file's tensors.
        metadata: the file's metadata.

    Returns:
        The tensors by name, in their order.

    Raises:
        CheckpointError: an unknown format version, or metadata that is damaged or does not fit the
            tensors.
    """
    found = metadata.get(_VERSION_KEY)
    if found != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: metadata {_VERSION_KEY!r}: expected '{FORMAT_VERSION}', found {found!r:.200}"
        )
    raw = metadata.get(_TENSORS_KEY, "").encode()
    entries = parse_object(raw, f"{path}: metadata {_TENSORS_KEY!r}")
    for name, entry in entries.items():
        if name not in tensors:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected it beside the metadata that describes it, "
                "found no such tensor"
            )
        _check_entry(path, name, entry)
    return {
        name: _unpack_tensor(tensor, entries[name]) if name in entries else tensor
        for name, tensor in tensors.items()
    }


def _check_entry(path: Path, name: str, entry: Any) -> None:
    def fault(expected: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{path}: tensor {name!r}: expected {expected}, found {found!r:.200}"
        )

    if not is_quantized(name):
        raise fault("only projections and the head to be quantised", name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape"}:
        raise fault("metadata of dtype and shape", entry)
    if entry["dtype"] not in QUANTIZATIONS:
        raise fault(f"a dtype of {', '.join(QUANTIZATIONS)}", entry["dtype"])
    shape = entry["shape"]
    is_matrix = isinstance(shape, list) and len(shape) == 2
    if not is_matrix or not all(type(axis) is int and 0 < axis < _MAX_AXIS for axis in shape):
        raise fault("a shape of two positive integers", shape)


def _unpack_tensor(tensor: StoredTensor, entry: dict[str, Any]) -> PackedTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    expected = padded_bytes(dtype, shape)
    if tensor.encoding != "U8" or tensor.payload.nbytes != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected {expected} bytes in U8 for "
            f"{dtype} {shape}, found {tensor.payload.nbytes} in {tensor.encoding}"
        )
    payload = tensor.payload[: weight_num_bytes(dtype, shape)]
    return PackedTensor(tensor.name, tensor.file, dtype, shape, payload)
