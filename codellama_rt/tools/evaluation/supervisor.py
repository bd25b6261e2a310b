"""Run one program in a child process within limits, and exit with its verdict.

A script of its own, started by `execution`; it reads the program from stdin, writes the reason of
a failure to stdout and tells the verdict by its exit status, so that nothing the program writes
anywhere is taken for one.

A pass is agreed on after the program's last line: the child says that it is done, then gets a
number drawn at that moment, and returns it. Until then there is no secret in the child's memory,
arguments, environment or files, and an unexpected message is a failure. What remains is a program
written against this very protocol, or one that changes the interpreter's memory with native code:
the tests and the program share one interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

PASSED, FAILED, TIMED_OUT = 10, 11, 12  # exit statuses
MAX_TASKS = 64  # processes and threads of a program
MAX_FILES = 1000  # in its folder
MAX_FILE_BYTES = 2**24
MAX_FOLDER_BYTES = 2**26
MAX_REASON_BYTES = 500
_TICK_S = 0.02  # between two looks at what the program uses
_READY, _DONE, _FAILED = b"ready", b"done", b"failed"  # what a child says
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LIBC = ctypes.CDLL(None, use_errno=True)


class Settings(NamedTuple):
    """What the evaluator asks for."""

    timeout_s: float
    memory_bytes: int  # address space of a process, and resident memory of all
    folder: str
    user: int | None  # id to run the program as, which no other process has
    namespace: bool  # this process is the first of a PID namespace


def main() -> None:
    """Run the program of stdin with the settings of the first argument."""
    settings = Settings(**json.loads(sys.argv[1]))
    source = sys.stdin.buffer.read().decode(errors="replace")
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program cannot trace this process
    if settings.user is not None:
        os.chown(settings.folder, settings.user, settings.user)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        run(source, theirs.detach(), settings)
    theirs.close()
    try:
        await_start(ours)
        status, reason = supervise(child, ours, settings)
    finally:
        kill_descendants(settings)
    with contextlib.suppress(BrokenPipeError):
        os.write(1, reason.encode(errors="replace"))
    os._exit(status)


def await_start(channel: socket.socket) -> None:
    """Wait until the child is within its limits.

    Raises:
        RuntimeError: it cannot enter them.
    """
    message = channel.recv(MAX_REASON_BYTES)
    if message != _READY:
        raise RuntimeError(message.decode(errors="replace") or "the child has ended")


def supervise(child: int, channel: socket.socket, settings: Settings) -> tuple[int, str]:
    """Follow a program until it has ended or reached a limit.

    Returns:
        The exit status and a reason. Processes of the program may still run.
    """
    deadline = time.monotonic() + settings.timeout_s
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(1, 0)  # an error: the evaluator has gone
    secret = None
    while (left := deadline - time.monotonic()) > 0:
        exited = child in _reap()  # what it wrote before can be read by now
        events = dict(poller.poll(0 if exited else min(left, _TICK_S) * 1000))
        if 1 in events:
            return FAILED, "the evaluator has ended"
        if channel.fileno() in events:
            message = channel.recv(len(_FAILED) + MAX_REASON_BYTES + 1)
            if secret is not None:
                return (PASSED, "") if message == secret else (FAILED, "a pass was forged")
            if message != _DONE:
                return FAILED, _reason(message)
            secret = secrets.token_bytes(32)
            with contextlib.suppress(OSError):  # the child has gone
                channel.send(secret)
        elif exited:
            return FAILED, "the process was ended by a limit, or by itself"
        if excess := find_excess(settings):
            return FAILED, excess
    return TIMED_OUT, ""


def _reason(message: bytes) -> str:
    if not message:
        return "the process was ended by a limit, or by itself"
    if not message.startswith(_FAILED):
        return "the program wrote to the channel of its verdict"
    return message.removeprefix(_FAILED).decode(errors="replace")


def _reap() -> set[int]:
    """Collect descendants that have ended."""
    ended = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    return ended


def find_excess(settings: Settings) -> str:
    """Return which limit all processes of the program together have passed, or an empty string."""
    tasks = memory = 0
    for pid in descendants():
        with contextlib.suppress(OSError):  # it has ended
            tasks += len(os.listdir(f"/proc/{pid}/task"))
            memory += _resident_bytes(pid)
        if tasks > MAX_TASKS:
            return f"more than {MAX_TASKS} processes and threads"
    if memory > settings.memory_bytes:
        return f"more than {settings.memory_bytes} bytes of memory"
    return _folder_excess(settings.folder)


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


def _folder_excess(folder: str) -> str:
    count = size = 0
    pending = [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
                    if count > MAX_FILES or size > MAX_FOLDER_BYTES:
                        return f"more than {MAX_FILES} files or {MAX_FOLDER_BYTES} bytes in files"
        except FileNotFoundError:  # the program has removed it
            continue
        except OSError as error:
            return f"a folder that cannot be read: {error.strerror}"
    return ""


def kill_descendants(settings: Settings) -> None:
    """Kill until no child is left.

    Orphans become children of this process, which is their subreaper: without a child there is no
    descendant.
    """
    while True:
        _strike(settings)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if settings.namespace or settings.user is not None:
            time.sleep(0.001)  # one strike reaches all; they need a moment to end


def _strike(settings: Settings) -> None:
    if settings.namespace:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all in the namespace but this process
    elif settings.user is not None:
        killer = os.fork()
        if killer == 0:
            os.setresuid(settings.user, settings.user, settings.user)
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of this user but this process
            os._exit(0)
        os.waitpid(killer, 0)
    else:
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run(source: str, channel: int, settings: Settings) -> NoReturn:
    """Run the program in this process and report how it ended."""
    try:
        enter_limits(channel, settings)
    except (OSError, ValueError) as error:
        os.write(channel, str(error).encode(errors="replace")[:MAX_REASON_BYTES])
        os._exit(1)
    os.write(channel, _READY)
    # The program may replace what modules and builtins hold.
    pid, getpid, read, write, leave = os.getpid(), os.getpid, os.read, os.write, os._exit
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        if getpid() == pid:
            write(channel, _DONE)
            write(channel, read(channel, 64))
    except BaseException as error:
        try:
            text = f"{type(error).__name__}: {error}"
        except BaseException:  # its __str__ is the program's
            text = "an exception without text"
        write(channel, (_FAILED + text.encode(errors="replace"))[:MAX_REASON_BYTES])
    finally:
        leave(0)


def enter_limits(channel: int, settings: Settings) -> None:
    """Give up what a program does not need; `channel` is the only open file that stays."""
    os.setsid()
    os.chdir(settings.folder)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, channel)
    os.closerange(channel + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    tasks = MAX_TASKS
    if settings.user is None:
        tasks += _tasks_of_user()
    limits = {
        resource.RLIMIT_CPU: int(settings.timeout_s) + 1,
        resource.RLIMIT_AS: settings.memory_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        highest = resource.getrlimit(name)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(name, (value, value))
    if settings.user is not None:
        os.setgroups([])
        os.setresgid(settings.user, settings.user, settings.user)
        os.setresuid(settings.user, settings.user, settings.user)
    _drop_capabilities()
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # its folder in /proc is its own again
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _confine_to(settings.folder)


def _tasks_of_user() -> int:
    """Count the processes and threads of this user, which RLIMIT_NPROC counts, too."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _drop_capabilities() -> None:
    """Drop all capabilities; with no_new_privs, no later exec restores them."""
    number = _CAPSET.get(os.uname().machine)
    if number is not None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        _LIBC.syscall(number, header, (ctypes.c_uint32 * 6)())


def _confine_to(folder: str) -> None:
    """Forbid writing elsewhere, tracing and signalling others, and TCP, by Landlock if possible."""
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    writes = 0x1FF2  # write, make and remove files of every kind
    writes |= (version >= 2) << 13 | (version >= 3) << 14  # move between folders; truncate
    tcp = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = (ctypes.c_uint64 * 3)(writes, tcp, scope)
    rules = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(24), 0)
    to_files = 2 | writes & 1 << 14
    for path, allowed in ((folder, writes), (os.devnull, to_files)):
        opened = os.open(path, os.O_PATH)
        rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _LIBC.syscall(_LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(opened)
    if rules < 0 or _LIBC.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock refuses its rules")
    os.close(rules)


if __name__ == "__main__":
    main()
