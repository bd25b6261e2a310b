"""Run one program in a child process within limits, and exit with its verdict.

The main module of a process that `execution` starts. It reads the program from stdin, writes the
reason of a failure to stdout and tells the verdict by its exit status, so that nothing the program
writes anywhere is taken for one.

A pass is agreed on after the program's last line: the child says that it is done and waits for a
number drawn at that moment, which it returns. Until then there is no secret in the child's memory,
arguments, environment or files, and an unexpected message is a failure. The number is only sent
while the child's first thread waits at the depth of the stack where it waited before the program
began; code of the program, called from there, is always deeper. What remains is a program that
changes the interpreter itself, with native code or, from Python 3.13 on, through the local
variables of the frames below its own, or that makes its tests meaningless: the tests and the
program share one interpreter.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple, NoReturn

from codellama_rt.tools.evaluation.confinement import Settings, enter_limits
from codellama_rt.tools.evaluation.usage import descendants, find_excess, place

PASSED, FAILED, TIMED_OUT = 10, 11, 12  # exit statuses
MAX_REASON_BYTES = 500
_TICK_S = 0.02  # between two looks at what the program uses
_SHORT_TICK_S = 0.001  # while it is about to wait
_READY, _DONE, _FAILED = b"ready", b"done", b"failed"  # what a child says
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(options: str) -> None:
    """Run the program of stdin with settings given as JSON."""
    settings = Settings(**json.loads(options))
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
        end = await_start(ours, settings)
        status, reason = supervise(child, ours, settings, end)
    finally:
        kill_descendants(settings)
        remove(settings.folder)
    with contextlib.suppress(BrokenPipeError):
        os.write(1, reason.encode(errors="replace"))
    os._exit(status)


class End(NamedTuple):
    """Where a program's process waits before and after the program."""

    pid: int  # as in /proc
    place: tuple[bytes, ...]  # empty: unknown

    def is_reached(self, settings: Settings) -> bool:
        """Return whether the process waits there now."""
        return not self.place or place(self.pid, settings.user) == self.place


def await_start(channel: socket.socket, settings: Settings) -> End:
    """Wait until the child is within its limits, and let it begin.

    Raises:
        RuntimeError: it cannot enter them.
    """
    message = channel.recv(MAX_REASON_BYTES)
    if message != _READY:
        raise RuntimeError(message.decode(errors="replace") or "the child has ended")
    pid = next(descendants())
    while (waits := place(pid, settings.user)) is None:
        time.sleep(_SHORT_TICK_S)
    channel.send(_READY)
    return End(pid, waits)


def supervise(child: int, channel: socket.socket, settings: Settings, end: End) -> tuple[int, str]:
    """Follow a program until it has ended or reached a limit.

    Returns:
        The exit status and a reason. Processes of the program may still run.
    """
    deadline = time.monotonic() + settings.timeout_s
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(1, 0)  # an error: the evaluator has gone
    done, secret = False, None
    while (left := deadline - time.monotonic()) > 0:
        exited = child in _reap()  # what it wrote before can be read by now
        tick = _SHORT_TICK_S if done and secret is None else _TICK_S
        events = dict(poller.poll(0 if exited else min(left, tick) * 1000))
        if 1 in events:
            return FAILED, "the evaluator has ended"
        if channel.fileno() in events:
            message = channel.recv(len(_FAILED) + MAX_REASON_BYTES + 1)
            if secret is not None:
                return (PASSED, "") if message == secret else (FAILED, "a pass was forged")
            if done or message != _DONE:
                return FAILED, _reason(message)
            done = True
        elif exited:
            return FAILED, "the process was ended by a limit, or by itself"
        if done and secret is None and end.is_reached(settings):
            secret = secrets.token_bytes(32)
            with contextlib.suppress(OSError):  # the child has gone
                channel.send(secret)
        if excess := find_excess(settings.folder, settings.memory_bytes, settings.user):
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
    if settings.namespace and os.getpid() == 1:
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


def remove(folder: str) -> None:
    """Remove what a program has left, whatever its depth and permissions; follow no link."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", "--", folder], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", "--", folder], capture_output=True, check=False)


def run(source: str, channel: int, settings: Settings) -> NoReturn:
    """Run the program in this process and report how it ended."""
    try:
        enter_limits(channel, settings)
    except (OSError, ValueError) as error:
        os.write(channel, str(error).encode(errors="replace")[:MAX_REASON_BYTES])
        os._exit(1)
    sys.addaudithook(_refuse_tracing)
    # The program may replace what modules and builtins hold; what it puts there must not be called
    # from here, at the depth of the end.
    pid, getpid, read, write, leave = os.getpid(), os.getpid, os.read, os.write, os._exit
    kind = type
    # The C library's read differs once a process has had a second thread, and must not.
    _thread.start_new_thread(getpid, ())
    write(channel, _READY)
    read(channel, 64)
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        if getpid() == pid:
            write(channel, _DONE)
            write(channel, read(channel, 64))
    except BaseException as error:
        try:
            text = f"{kind(error).__name__}: {error}"
        except BaseException:  # its __str__ is the program's
            text = "an exception without text"
        write(channel, (_FAILED + text.encode(errors="replace"))[:MAX_REASON_BYTES])
    finally:
        leave(0)


def _refuse_tracing(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a trace function, which could move the frames of this module to their ends."""
    if event == "sys.settrace":
        raise RuntimeError("programs cannot trace")
