"""Writes safetensors files a tensor at a time: what they hold is never in memory at once."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

_ALIGNMENT = 64  # of the first tensor's bytes in the file


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str  # in safetensors' words
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], np.ndarray]  # its bytes, uint8; called when its turn has come


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str],
    written: Callable[[Entry], None],
) -> None:  # fmt: skip
    """Writes a file; it is complete, and on the disk, when this returns.

    Args:
        path: the file, made anew.
        entries: the tensors in the order of their bytes.
        metadata: of the file.
        written: called after each tensor.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "xb") as file:
        _write_header(file, entries, metadata)
        for entry in entries:
            content = entry.read()
            assert content.nbytes <= entry.num_bytes, entry.name
            file.write(content.data)
            file.write(bytes(entry.num_bytes - content.nbytes))
            written(entry)
        sync(file)


def sync(file: BinaryIO) -> None:
    """Sees to it that what was written survives the machine's fall."""
    file.flush()
    os.fsync(file.fileno())


def _write_header(file: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        offsets = [end, end := end + entry.num_bytes]
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets,
        }  # fmt: skip
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little") + raw)
