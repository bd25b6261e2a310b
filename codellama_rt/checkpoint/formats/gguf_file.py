"""Read GGUF files (versions 2 and 3); every count and offset is checked against the file.

Quantised tensors of formats that no operator takes are decoded to float32 by the `gguf` package,
imported on first use.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.stored_tensor import (
    DOUBLE,
    StoredTensor,
    map_file,
    stored_tensor,
)
from codellama_rt.errors import CheckpointError
from codellama_rt.ops.dtypes import FLOATS
from codellama_rt.ops.quantized import GGUF_BLOCKS

MAGIC = b"GGUF"
_FLOAT_TYPES = {known.ggml_type: known for known in FLOATS.values()}
_BLOCK_TYPES = {  # supported by ops
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
}
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q").unpack_from  # of a string, in front of it
_F64 = 28
_MAX_AXES = 4  # as in ggml
_MAX_AXIS = 2**48


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: metadata by key and tensors by name.

    Strings that are not UTF-8 keep their bytes as surrogate escapes; numeric arrays are NumPy's.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class QuantizedTensor(StoredTensor):
    """A tensor in one of ggml's block formats."""

    @property
    def weight_dtype(self) -> str | None:
        """The name of the format among `ops`' weight dtypes, or None."""
        name = self.encoding.lower()
        return name if name in GGUF_BLOCKS and len(self.shape) == 2 else None

    def decode(self, begin: int, end: int) -> np.ndarray:
        """Return the rows begin..end as float32."""
        gguf = _import_gguf(self.file)
        kind = gguf.GGMLQuantizationType[self.encoding]
        rows = self.payload.reshape(*self.shape[:-1], -1)
        try:
            with np.errstate(
                all="ignore"
            ):  # a scale of inf becomes NaN, which check="finite" finds
                if len(self.shape) == 1:  # blocks run along the last axis: decode all, then slice
                    return gguf.dequantize(rows, kind)[begin:end]
                return gguf.dequantize(rows[begin:end], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r}: expected F32, F16, BF16 or a type the gguf "
                "package "
                f"can decode, found {self.encoding}"
            ) from None


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its header.

    Args:
        path: the file.

    Returns:
        Its metadata and tensors; no tensor has been read.

    Raises:
        CheckpointError: not GGUF, another version or byte order, truncated, a duplicate key or
            tensor, or offsets that leave the file, overlap or are misaligned.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
        >>> _ = path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(8))
        >>> read_gguf(path).metadata
        {}
    """
    mapped = map_file(path)
    cursor = _Cursor(path, mapped)
    if cursor.take(4) != MAGIC:
        raise CheckpointError(
            f"{path}: expected the file to begin with {MAGIC!r}, found {mapped[:4].tobytes()!r}; "
            "give a GGUF file, or the directory with the safetensors files"
        )
    (version,) = cursor.unpack("<I")
    if version not in (2, 3):
        what = "a big-endian file" if version >= 2**16 else f"version {version}"
        raise CheckpointError(f"{path}: expected GGUF version 2 or 3, little-endian, found {what}")
    n_tensors, n_keys = cursor.unpack("<QQ")
    metadata = _read_metadata(cursor, n_keys)
    entries = [_read_entry(cursor) for _ in range(n_tensors)]
    return GgufFile(
        path, metadata, _place_tensors(path, mapped, entries, cursor.position, metadata)
    )


def find_gguf_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a GGUF file, None for a file of another format.

    Raises:
        CheckpointError: as `read_gguf`.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    return read_gguf(path).metadata if is_gguf else None


class _Cursor:
    """Read forward through the header; reading past the end of the file is an error."""

    def __init__(self, path: Path, mapped: np.ndarray):
        self.path = path
        self.position = 0
        self._buffer = memoryview(mapped)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._buffer):
            raise CheckpointError(
                f"{self.path}: expected {count} bytes at offset {self.position}, "
                f"found {len(self._buffer) - self.position}; the file is truncated or damaged"
            )
        taken = self._buffer[self.position : end].tobytes()
        self.position = end
        return taken

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def name(self, what: str) -> str:
        (length,) = self.unpack("<Q")
        if length > 65535:
            raise CheckpointError(
                f"{self.path}: {what}: expected at most 65535 bytes, found {length}"
            )
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what}: expected UTF-8, found {error}") from None

    def value(self, key: str) -> Any:
        (kind,) = self.unpack("<I")
        if kind != _ARRAY:
            return self._scalar(key, kind)
        item_kind, count = self.unpack("<IQ")
        if item_kind == _STRING:
            return self._strings(count)
        if item_kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: metadata key {key!r}: expected an array of numbers or strings, "
                f"found items of type {item_kind}"
            )
        dtype = np.dtype(_SCALARS[item_kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _scalar(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: metadata key {key!r}: expected a value type from 0 to 12, found "
                f"{kind}"
            )
        return self.unpack("<" + _SCALARS[kind])[0]

    def _strings(self, count: int) -> list[str]:
        """Read strings one by one in a tight loop: a vocabulary has 100,000."""
        buffer, size, position, strings = self._buffer, len(self._buffer), self.position, []
        for _ in range(count):
            start = position + 8
            if start <= size:
                position = start + _LENGTH(buffer, position)[0]
            if not start <= position <= size:
                raise CheckpointError(
                    f"{self.path}: expected a string to end at offset {max(start, position)}, "
                    f"found a file of {size} bytes; it is truncated or damaged"
                )
            strings.append(str(buffer[start:position], "utf-8", "surrogateescape"))
        self.position = position
        return strings


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.name("metadata key")
        if key in metadata:
            raise CheckpointError(
                f"{cursor.path}: metadata key {key!r}: expected it once, found it twice"
            )
        metadata[key] = cursor.value(key)
    return metadata


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read name, shape (outermost axis first), ggml type and offset of one tensor."""
    name = cursor.name("tensor name")
    (n_axes,) = cursor.unpack("<I")
    if not 1 <= n_axes <= _MAX_AXES:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r}: expected 1 to {_MAX_AXES} axes, found {n_axes}"
        )
    axes = cursor.unpack(f"<{n_axes}Q")
    if not all(1 <= axis <= _MAX_AXIS for axis in axes):
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r}: expected axes from 1 to {_MAX_AXIS}, found {axes}"
        )
    ggml_type, offset = cursor.unpack("<IQ")
    return name, axes[::-1], ggml_type, offset


def _place_tensors(
    path: Path, mapped: np.ndarray, entries: list[tuple], header_end: int, metadata: dict[str, Any]
) -> dict[str, StoredTensor]:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment: expected a power of two, found {alignment!r}"
        )
    begin = -(-header_end // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    end, previous = begin, "the header"
    for name, shape, ggml_type, offset in sorted(entries, key=lambda entry: entry[3]):
        encoding, size = _encoding(path, name, shape, ggml_type)
        start = begin + offset
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name!r}: expected it once, found it twice")
        if offset % alignment:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected an offset that is a multiple of {alignment}, "
                f"found {offset}"
            )
        if start < end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected bytes from {end} on, found {start}; it "
                f"overlaps {previous}"
            )
        if start + size > len(mapped):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected its bytes to end at {start + size}, found a "
                "file of "
                f"{len(mapped)}; it is truncated"
            )
        is_plain = ggml_type in _FLOAT_TYPES or ggml_type == _F64
        kind = stored_tensor if is_plain else QuantizedTensor
        tensors[name] = kind(name, path, encoding, shape, mapped[start : start + size])
        end, previous = start + size, repr(name)
    return tensors


def _encoding(path: Path, name: str, shape: tuple[int, ...], ggml_type: int) -> tuple[str, int]:
    """Return the name of a ggml type and the bytes of a tensor of it."""
    if ggml_type in _FLOAT_TYPES:
        known = _FLOAT_TYPES[ggml_type]
        return known.encoding, math.prod(shape) * known.dtype.itemsize
    if ggml_type == _F64:
        return DOUBLE, math.prod(shape) * 8
    encoding, block, block_bytes = _block_type(path, name, ggml_type)
    if shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected rows of a multiple of {block} for {encoding}, "
            f"found {shape}"
        )
    return encoding, math.prod(shape) // block * block_bytes


def _block_type(path: Path, name: str, ggml_type: int) -> tuple[str, int, int]:
    """Return the name of a block format, and the elements and bytes per block."""
    if ggml_type in _BLOCK_TYPES:
        encoding = _BLOCK_TYPES[ggml_type]
        return encoding, *GGUF_BLOCKS[encoding.lower()]
    gguf = _import_gguf(path)
    try:
        kind = gguf.GGMLQuantizationType(ggml_type)
        return kind.name, *gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected a ggml type the gguf package knows, found "
            f"{ggml_type}; a newer gguf may support it"
        ) from None


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise RuntimeError(
            f"{path}: quantised tensors need the gguf package; install it with: pip install gguf"
        ) from None
    return gguf
