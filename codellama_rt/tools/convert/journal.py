"""The progress of a conversion, recorded so that an interrupted one can resume.

The work is in a hidden directory beside the output, `.<name>.partial`: the journal, and a
directory that becomes the output by one rename when it is complete. The journal's first line says
what is converted, how, and from which files; a different conversion starts over.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from codellama_rt.checkpoint.formats.tensor_file import Layout, sync


class Journal:
    """The journal of one conversion, locked against other processes while it is open.

    Args:
        out: the directory that the conversion creates.
        identity: what is converted and how, as JSON.

    Raises:
        RuntimeError: another process is writing it.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Open the journal, or start a new one."""
        self.folder = work_folder(out)
        self.output = self.folder / out.name
        self._first = json.dumps(identity, sort_keys=True)
        self._checksums: dict[str, list[int]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / "journal", "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RuntimeError(f"{out} is being written by another process") from None
        if not self._read():
            self._begin()
        self.output.mkdir(exist_ok=True)

    def _read(self) -> bool:
        """Load an earlier run's progress if it did the same; a truncated line is dropped."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]
        if not lines or lines[0] != self._first.encode():
            return False
        try:
            for line in lines[1:]:
                entry = json.loads(line)
                self._checksums.setdefault(entry["file"], []).extend(entry["crc32"])
        except (ValueError, KeyError, TypeError):  # a damaged disk
            self._checksums = {}
            return False
        self._file.truncate(sum(len(line) + 1 for line in lines))
        return True

    def _begin(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self._file.truncate(0)
        self._append(self._first)

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        sync(self._file)

    def done(self, file: str, layout: Layout) -> list[int]:
        """Return the CRC-32s of the tensors that an output file already has."""
        checksums = self._checksums.get(file, [])
        path = self.output / file
        has_all = path.is_file() and path.stat().st_size >= layout.offset(len(checksums))
        return checksums if has_all else []

    def add(self, file: str, checksums: Sequence[int]) -> None:
        """Record that the next tensors of a file are on disk."""
        self._append(json.dumps({"file": file, "crc32": list(checksums)}))

    def discard(self) -> None:
        """Remove everything: the output is complete, or cannot be completed."""
        shutil.rmtree(self.folder)

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock; written data stays."""
        self._file.close()


def work_folder(out: Path) -> Path:
    """Return where a conversion to `out` keeps its work.

    Example:
        >>> work_folder(Path("models/new"))
        PosixPath('models/.new.partial')
    """
    return out.with_name(f".{out.name}.partial")
