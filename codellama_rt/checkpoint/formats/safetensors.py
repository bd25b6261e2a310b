"""Read and write safetensors files; every offset in a header is checked before a tensor is used.

The format: 8 bytes of header length, the header in JSON, then the tensors' bytes without gaps. The
reference reader accepts duplicate names in the header (the last wins); here they are an error.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.formats.strict_json import MAX_JSON_BYTES, parse_object
from codellama_rt.checkpoint.formats.tensor_file import Entry, write_tensor_file
from codellama_rt.checkpoint.stored_tensor import StoredTensor, map_file, stored_tensor
from codellama_rt.errors import CheckpointError

ITEM_BYTES = {
    dtype: num_bytes
    for num_bytes, dtypes in (
        (1, "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0"),
        (2, "U16 I16 F16 BF16"),
        (4, "U32 I32 F32"),
        (8, "U64 I64 F64 C64"),
    )
    for dtype in dtypes.split()
}
_MAX_AXES = 8
_MAX_AXIS = 2**48
_ALIGNMENT = 64  # of the first tensor's bytes in files written here


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map a safetensors file and list its tensors.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the order of their bytes; none has been read.

    Raises:
        CheckpointError: truncated or oversized file or header, invalid JSON, duplicate names, an
            unknown dtype, a shape that contradicts the bytes, overlapping or unassigned bytes.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        >>> _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        >>> read_safetensors(path)["a"].view()
        array([0.], dtype=float32)
    """
    return read_safetensors_file(path)[0]


def read_safetensors_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Map a safetensors file; return its tensors, as `read_safetensors`, and its metadata.

    The metadata are free-form; empty where the file has none.

    Raises:
        CheckpointError: as `read_safetensors`, or the metadata are not strings.
    """
    mapped = map_file(path)
    header, begin = _read_header(path, mapped)
    payload = mapped[begin:]
    metadata = header.pop("__metadata__", {})
    _check_metadata(path, metadata)
    entries = [(name, *_read_entry(path, name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    _check_contiguous(path, entries, len(payload))
    tensors = {
        name: stored_tensor(name, path, dtype, shape, payload[start:stop])
        for name, dtype, shape, start, stop in entries
    }
    return tensors, metadata


def _read_header(path: Path, mapped: np.ndarray) -> tuple[dict[str, Any], int]:
    if len(mapped) < 8:
        raise CheckpointError(
            f"{path}: expected 8 bytes of header length, found a file of {len(mapped)} bytes; it "
            "is truncated"
        )
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: expected a header of at most {MAX_JSON_BYTES} bytes, found {length}; not "
            "safetensors"
        )
    if 8 + length > len(mapped):
        raise CheckpointError(
            f"{path}: expected a header of {length} bytes, found {len(mapped) - 8}; the file is "
            "truncated"
        )
    return parse_object(mapped[8 : 8 + length].tobytes(), f"{path}: header"), 8 + length


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__: expected an object of strings, found {metadata!r:.200}"
        )


def _read_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Check one entry of the header; return its dtype, shape and byte range."""

    def fault(what: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{path}: tensor {name!r}: {what}: expected {expected}, found {found!r:.200}"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("entry", "an object of dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault("dtype", f"one of {', '.join(ITEM_BYTES)}", dtype)
    if not _is_integers(shape) or len(shape) > _MAX_AXES or any(axis > _MAX_AXIS for axis in shape):
        raise fault("shape", f"at most {_MAX_AXES} integers from 0 to {_MAX_AXIS}", shape)
    if not _is_integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault("data_offsets", "two integers, begin and end", offsets)
    expected, found = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if expected != found:
        raise fault("data_offsets", f"{expected} bytes for {dtype} {shape}", found)
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(path: Path, entries: list[tuple], length: int) -> None:
    """Check that the tensors, in the order of their bytes, fill the payload exactly."""
    end, previous = 0, "the header"
    for name, _, _, start, stop in entries:
        if start != end:
            what = "overlaps" if start < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected its bytes to begin at {end}, found {start}; "
                f"it {what} {previous}"
            )
        end, previous = stop, repr(name)
    if end != length:
        what = "the file is truncated" if end > length else "bytes at the end belong to no tensor"
        raise CheckpointError(
            f"{path}: {previous} ends last: expected {end} bytes of tensors, found {length}; {what}"
        )


class SafetensorsLayout:
    """The tensors of a file, in the order of their bytes, and its metadata."""

    def __init__(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        """Lay out the tensors."""
        self.entries = entries
        ends = list(itertools.accumulate((entry.num_bytes for entry in entries), initial=0))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for entry, offsets in zip(entries, itertools.pairwise(ends), strict=True):
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
        self._head = len(raw).to_bytes(8, "little") + raw
        self._ends = ends

    def offset(self, i: int) -> int:
        """Return where entry i begins."""
        return len(self._head) + self._ends[i]

    def head(self) -> bytes:
        """Return the header."""
        return self._head

    def before(self, i: int, checksum: int) -> bytes:
        """Return nothing: there are no bytes between tensors."""
        return b""

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Return nothing: the file ends with the last tensor."""
        return b""


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    written: Callable[[Entry], None],
) -> None:
    """Write a file; on return it is complete and on disk.

    Args:
        path: the file; an existing one is replaced.
        entries: the tensors in the order of their bytes.
        metadata: the file's metadata.
        written: called after each tensor.

    Raises:
        OSError: the file cannot be written.
    """
    layout = SafetensorsLayout(entries, metadata)
    write_tensor_file(path, layout, written, lambda checksums: None)
