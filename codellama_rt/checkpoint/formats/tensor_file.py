"""Writes files of tensors one after another: what they hold is never in memory at once.

Sizes are known beforehand, so every tensor's place is, too: writing can end anywhere and go on
there later, in another process.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

SYNC_BYTES = 2**26  # what a fall of the machine may cost; more often would wait for the disk


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str  # in safetensors' words
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], np.ndarray]  # its bytes, uint8; called when its turn has come

    def content(self) -> np.ndarray:
        """Its bytes, all of them: what is read is padded with zeros."""
        content = self.read()
        assert content.nbytes <= self.num_bytes, self.name
        if content.nbytes == self.num_bytes:
            return content
        return np.concatenate([content, np.zeros(self.num_bytes - content.nbytes, np.uint8)])


class Layout(Protocol):
    """What a format puts before, between and after tensors.

    Attributes:
        entries: the tensors in the order of their bytes.
    """

    entries: Sequence[Entry]

    def offset(self, i: int) -> int:
        """Where entry i, with what stands before it, begins; of the number of entries: the end."""

    def head(self) -> bytes:
        """What stands before all."""

    def before(self, i: int, checksum: int) -> bytes:
        """What stands before entry i, whose CRC-32 is given."""

    def tail(self, checksums: Sequence[int]) -> bytes:
        """What stands after all."""


def write_tensor_file(
    path: Path,
    layout: Layout,
    written: Callable[[Entry], None],
    synced: Callable[[Sequence[int]], None],
    checksums: Sequence[int] = (),
) -> None:
    """Writes a file, or what is missing of one; it is complete, and on the disk, on return.

    Args:
        path: the file.
        layout: its tensors and format.
        written: called after each tensor.
        synced: called with the CRC-32 of further tensors when they are on the disk.
        checksums: of the tensors that are in the file already, the first ones.

    Raises:
        OSError: the file cannot be written.
    """
    checksums, begin = list(checksums), layout.offset(len(checksums))
    kept, kept_bytes = len(checksums), begin
    with open(path, "r+b" if checksums else "wb") as file:
        if checksums:
            file.truncate(begin)
            file.seek(begin)
        else:
            file.write(layout.head())
        for i, entry in enumerate(layout.entries[kept:], kept):
            checksums.append(_write_entry(file, layout, i))
            written(entry)
            if file.tell() - kept_bytes >= SYNC_BYTES:
                sync(file)
                synced(checksums[kept:])
                kept, kept_bytes = len(checksums), file.tell()
        assert file.tell() == layout.offset(len(layout.entries)), path
        file.write(layout.tail(checksums))
        sync(file)
    synced(checksums[kept:])


def _write_entry(file: BinaryIO, layout: Layout, i: int) -> int:
    """Writes one tensor; returns its CRC-32."""
    content = layout.entries[i].content()
    checksum = zlib.crc32(content.data)
    file.write(layout.before(i, checksum))
    file.write(content.data)
    return checksum


def sync(file: BinaryIO) -> None:
    """Sees to it that what was written survives the machine's fall."""
    file.flush()
    os.fsync(file.fileno())
