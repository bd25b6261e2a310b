"""How far a conversion got: a line for some tensors, so that an interrupted one goes on.

The work lies in a hidden directory beside the output, `.<name>.partial`: the journal, and a
directory that becomes the output by one rename when it is whole. The first line says what is being
converted, how, and from which files; another conversion begins anew.
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
    """The journal of one conversion, held against other processes while it is open.

    Args:
        out: the directory that the conversion makes.
        identity: what is converted and how; JSON.

    Raises:
        RuntimeError: another process is at it.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Open the journal, or begin one."""
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
        """Takes what an earlier run wrote, if it did the same; a line cut short is dropped."""
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
        """The CRC-32 of the tensors that a file of the output has already."""
        checksums = self._checksums.get(file, [])
        path = self.output / file
        has_all = path.is_file() and path.stat().st_size >= layout.offset(len(checksums))
        return checksums if has_all else []

    def add(self, file: str, checksums: Sequence[int]) -> None:
        """So many more tensors of a file are on the disk."""
        self._append(json.dumps({"file": file, "crc32": list(checksums)}))

    def discard(self) -> None:
        """Take all of it away: the output is made, or cannot be."""
        shutil.rmtree(self.folder)

    def __enter__(self) -> Journal:
        """The journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let it go; what is written stays."""
        self._file.close()


def work_folder(out: Path) -> Path:
    """Where a conversion to `out` keeps its work.

    Example:
        >>> work_folder(Path("models/new"))
        PosixPath('models/.new.partial')
    """
    return out.with_name(f".{out.name}.partial")
