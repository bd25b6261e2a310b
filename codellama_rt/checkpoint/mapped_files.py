"""Files mapped into memory, and whether they are still what they were.

A mapping shows what is written into its file, and reading beyond an end that was cut off ends the
process (SIGBUS). So whoever uses mapped weights asks before each use whether a file has another
size or time of modification than when it was mapped. docs/embedding.md says what goes unnoticed.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from codellama_rt.errors import CheckpointChangedError


class _State(NamedTuple):
    """What fstat says of a file; neither renaming nor removing it changes any of this."""

    file: tuple[int, int]  # device and inode
    num_bytes: int
    modified_ns: int


class MappedFile(mmap.mmap):
    """A read-only mapping of a whole file, which knows the file's state from before it was mapped.

    The file stays open: its name may come to stand for another file, which is no fault.

    Args:
        path: a regular file that is not empty.

    Raises:
        OSError: it cannot be read.
    """

    path: Path
    _descriptor: int
    _state: _State

    def __new__(cls, path: Path) -> MappedFile:
        """Open the file and map it."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            state = _state_of(descriptor)
            mapping = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        mapping.path, mapping._descriptor, mapping._state = path.absolute(), descriptor, state
        weakref.finalize(mapping, os.close, descriptor).atexit = False
        return mapping

    def check(self) -> None:
        """Compare the file with what it was.

        Raises:
            CheckpointChangedError: it has been cut, extended or written.
        """
        try:
            found = _state_of(self._descriptor)
        except OSError as error:
            raise _changed(
                self.path, "open", f"it closed by other code ({error.strerror})"
            ) from None
        if found != self._state:
            raise _changed(self.path, *_difference(self._state, found))


class MappedFiles:
    """The mapped files of some tensors.

    A file is dropped when nothing uses its mapping any more, because its tensors were converted or
    copied to a device.

    Args:
        mappings: of the files; one may be given several times.

    Example:
        >>> MappedFiles([MappedFile(Path(__file__))]).check()
    """

    def __init__(self, mappings: Iterable[MappedFile]) -> None:
        self._mappings = [weakref.ref(mapping) for mapping in dict.fromkeys(mappings)]

    def check(self) -> None:
        """Compare each file with what it was when it was mapped; 3 microseconds for each.

        Raises:
            CheckpointChangedError: one has been cut, extended or written.
        """
        for reference in self._mappings:
            mapping = reference()
            if mapping is not None:
                mapping.check()


def _state_of(descriptor: int) -> _State:
    found = os.fstat(descriptor)
    return _State((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def _difference(before: _State, found: _State) -> tuple[str, str]:
    """Return in words what was and what is."""
    if found.file != before.file:
        return "open", "its descriptor closed by other code, and used for another file"
    if found.num_bytes != before.num_bytes:
        return f"{before.num_bytes} bytes", f"{found.num_bytes}"
    return f"modified at {_time(before.modified_ns)}", f"{_time(found.modified_ns)}"


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}.{rest:09}"


def _changed(path: Path, expected: str, found: str) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{path}: expected the file as it was when it was mapped, {expected}, found {found}; open "
        "the checkpoint again, and replace a file in use by renaming another to its name, instead "
        "of writing into it"
    )
