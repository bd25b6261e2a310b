"""Write files of tensors one after another; their contents are never in memory all at once.

Sizes are known beforehand, and so is every tensor's place: writing can stop anywhere and resume
there later, in another process.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

SYNC_BYTES = 2**26  # what a crash of the machine may cost; smaller would wait for the disk


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], np.ndarray]  # returns its bytes, uint8; called only when they are written

    def content(self) -> np.ndarray:
        """Return all its bytes, padded with zeros."""
        content = self.read()
        assert content.nbytes <= self.num_bytes, self.name
        if content.nbytes == self.num_bytes:
            return content
        return np.concatenate([content, np.zeros(self.num_bytes - content.nbytes, np.uint8)])


class Layout(Protocol):
    """The bytes that a format puts before, between and after tensors.

    Attributes:
        entries: the tensors in the order of their bytes.
    """

    entries: Sequence[Entry]

    def offset(self, i: int) -> int:
        """Return where entry i begins, with what precedes it; for i = their number, the end."""

    def head(self) -> bytes:
        """Return the bytes at the start of the file."""

    def before(self, i: int, checksum: int) -> bytes:
        """Return the bytes before entry i, whose CRC-32 is given."""

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Return the bytes after the last entry."""


def write_tensor_file(
    path: Path,
    layout: Layout,
    written: Callable[[Entry], None],
    synced: Callable[[Sequence[int]], None],
    checksums: Sequence[int] = (),
) -> None:
    """Write a file, or complete it; on return it is whole and on disk.

    Args:
        path: the file.
        layout: its tensors and format.
        written: called after each tensor.
        synced: called with the CRC-32 of further tensors once they are on disk.
        checksums: of the first tensors, which the file already contains.

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
    """Write one tensor and return its CRC-32."""
    content = layout.entries[i].content()
    checksum = zlib.crc32(content.data)
    file.write(layout.before(i, checksum))
    file.write(content.data)
    return checksum


def sync(file: BinaryIO) -> None:
    """Make written data survive a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())
