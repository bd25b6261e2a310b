"""What the processes below this one use together, and where one of them stands."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator

MAX_TASKS = 64  # processes and threads of a program
MAX_FILES = 1000  # in its folder
MAX_FOLDER_BYTES = 2**26  # with files that have been removed, but are open
_TOO_MANY_TASKS = f"more than {MAX_TASKS} processes and threads"


@contextlib.contextmanager
def seen_as(user: int | None) -> Iterator[None]:
    """Act as the user of a program: root in a container may not look into others' processes."""
    if user is None:
        yield
        return
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def place(pid: int, user: int | None) -> tuple[bytes, ...] | None:
    """Return where the first thread of a process waits in a system call.

    Returns:
        The call's number and first argument, the stack pointer and the program counter; None: the
        thread does not wait; empty: this system does not tell.
    """
    try:
        with seen_as(user), open(f"/proc/{pid}/syscall", "rb") as file:
            words = file.read().split()
    except OSError:
        return ()
    return (words[0], words[1], words[-2], words[-1]) if len(words) == 9 else None


def find_excess(folder: str, memory_bytes: int, user: int | None) -> str:
    """Return which limit all processes of the program together have passed, or an empty string."""
    tasks = memory = 0
    pids = list(descendants())
    if len(pids) > MAX_TASKS:
        return _TOO_MANY_TASKS
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            tasks += len(os.listdir(f"/proc/{pid}/task"))
            memory += _resident_bytes(pid)
    if tasks > MAX_TASKS:
        return _TOO_MANY_TASKS
    if memory > memory_bytes:
        return f"more than {memory_bytes} bytes of memory"
    with seen_as(user):
        unlinked = _unlinked_bytes(pids)
    return _folder_excess(folder, unlinked)


def descendants() -> Iterator[int]:
    """Yield the processes below this one, each as soon as it is found, numbered as in /proc."""
    pending = ["self"]
    while pending:
        folder = f"/proc/{pending.pop()}/task"
        with contextlib.suppress(OSError):  # it has ended
            for task in os.listdir(folder):
                with open(f"{folder}/{task}/children", "rb") as file:
                    children = file.read().decode().split()
                yield from map(int, children)
                pending += children


def _resident_bytes(pid: int) -> int:
    """Return the memory of a process without the files it maps."""
    with open(f"/proc/{pid}/status", "rb") as file:
        fields = (line.split() for line in file)
        return sum(int(f[1]) * 1024 for f in fields if f[0] in (b"RssAnon:", b"RssShmem:"))


def _unlinked_bytes(pids: Iterable[int]) -> int:
    """Return the size of open files that no folder holds any more, or never did."""
    sizes = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or must not be looked at
            for name in os.listdir(f"/proc/{pid}/fd"):
                its = os.stat(f"/proc/{pid}/fd/{name}")
                if stat.S_ISREG(its.st_mode) and its.st_nlink == 0:
                    sizes[its.st_dev, its.st_ino] = its.st_blocks * 512
    return sum(sizes.values())


def _folder_excess(folder: str, unlinked: int) -> str:
    """Return whether files in and outside the folder are too many or too large."""
    count, size, pending = 0, unlinked, [folder]
    while pending and count <= MAX_FILES and size <= MAX_FOLDER_BYTES:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in itertools.islice(entries, MAX_FILES + 1):
                    count += 1
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
        except FileNotFoundError:  # the program has removed it
            continue
        except OSError as error:
            return f"a folder that cannot be read: {error.strerror}"
    if count > MAX_FILES or size > MAX_FOLDER_BYTES:
        return f"more than {MAX_FILES} files or {MAX_FOLDER_BYTES} bytes in files"
    return ""
