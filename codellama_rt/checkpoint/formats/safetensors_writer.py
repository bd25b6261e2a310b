"""Writes safetensors files: a header in JSON, then the tensors' bytes without gaps."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from codellama_rt.checkpoint.formats.tensor_file import Entry, write_tensor_file

_ALIGNMENT = 64  # of the first tensor's bytes in the file


class SafetensorsLayout:
    """The tensors of a file, in the order of their bytes, and its metadata."""

    def __init__(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        """Lays them out."""
        self.entries = entries
        ends = list(itertools.accumulate((entry.num_bytes for entry in entries), initial=0))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for entry, offsets in zip(entries, itertools.pairwise(ends), strict=True):
            header[entry.name] = {
                "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets,
            }  # fmt: skip
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
        self._head = len(raw).to_bytes(8, "little") + raw
        self._ends = ends

    def offset(self, i: int) -> int:
        """Where entry i begins."""
        return len(self._head) + self._ends[i]

    def head(self) -> bytes:
        """The header."""
        return self._head

    def before(self, i: int, checksum: int) -> bytes:
        """Nothing."""
        return b""

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Nothing."""
        return b""


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
    layout = SafetensorsLayout(entries, metadata)
    write_tensor_file(path, layout, written, lambda checksums: None)
