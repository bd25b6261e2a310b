"""Run programs written by a model in a restricted process.

Limits hold for all processes of a program together: time, memory, their number, and what they
write, which goes to an empty folder; all of them have ended when the verdict is returned. Where
the system allows, there is no network, and a program can neither write elsewhere (Landlock) nor
reach other processes (namespaces, Landlock; as root, also a user id of its own). This is not a
security boundary: a program can read what its user can read, and one that is written against this
evaluator can deceive it, as it shares an interpreter with its tests (see `supervisor`). Evaluate
untrusted models in a container.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from codellama_rt.tools.evaluation import supervisor
from codellama_rt.tools.evaluation.confinement import Settings

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
_RESULTS = {
    supervisor.PASSED: PASSED, supervisor.FAILED: FAILED, supervisor.TIMED_OUT: TIMED_OUT,
}  # fmt: skip
_NAMESPACES = ("unshare", "--net", "--pid", "--ipc", "--fork", "--kill-child")
_OWN_USER = ("--user", "--map-root-user")
# User ids that no account has, in a system that maps all and in one that maps 65,536 of them.
_USER_RANGES = (range(2_000_000_000, 2_000_000_000 + 2**20), range(20_000, 60_000))
_START = """
import sys
sys.path.insert(0, sys.argv[1])
from codellama_rt.tools.evaluation.supervisor import main
del sys.path[0]
main(sys.argv[2])
"""
_GRACE_S = 5.0  # for the supervisor to start and to end


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    result: str  # PASSED, FAILED or TIMED_OUT
    reason: str = ""


def run_program(source: str, *, timeout_s: float = 10.0, memory_bytes: int = 2**30) -> Verdict:
    """Run a Python program to its end.

    Args:
        source: the program; it passes if no exception ends it, not even SystemExit.
        timeout_s: limit of wall-clock seconds, and of CPU seconds per process, rounded up.
        memory_bytes: limit of the address space of a process, and of the memory of all.

    Returns:
        How it ended; the process and its descendants have been terminated.

    Raises:
        RuntimeError: programs cannot be supervised here.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    users = _users()
    settings = Settings(
        timeout_s=timeout_s,
        memory_bytes=memory_bytes,
        folder=folder,
        user=None if users is None else users.start + secrets.randbelow(len(users)),
        namespace=is_isolated(),
    )
    arguments = [str(Path(__file__).parents[3]), json.dumps(settings._asdict())]
    command = [*_prefix(), sys.executable, "-I", "-c", _START, *arguments]
    try:
        return _supervise(command, source, folder, timeout_s + _GRACE_S)
    finally:
        supervisor.remove(folder)  # should it have been killed


def _supervise(command: list[str], source: str, folder: str, timeout_s: float) -> Verdict:
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as program:
        program.write(source.encode(errors="replace"))
        program.seek(0)
        process = subprocess.Popen(
            command,
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        status = process.wait(timeout_s)
        reason = os.read(process.stdout.fileno(), 2**12).decode(errors="replace")
    except subprocess.TimeoutExpired:
        return Verdict(TIMED_OUT)
    finally:
        _end(process)
    if status in _RESULTS:
        return Verdict(_RESULTS[status], reason)
    if status < 0 or status > 128:
        return Verdict(FAILED, "the program's supervisor was ended by a signal")
    raise RuntimeError(f"the program's supervisor failed: {reason}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a supervisor end its program when it cannot report any more, then make sure."""
    assert process.stdout is not None
    process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_isolated() -> bool:
    """Return whether programs run without network, in their own namespaces."""
    return bool(_prefix())


@functools.cache
def _prefix() -> tuple[str, ...]:
    """Return the command that starts another in namespaces of its own, or nothing."""
    if os.geteuid() == 0 and _works([*_NAMESPACES, "true"]):
        return _NAMESPACES
    if _users() is None and _works([*_NAMESPACES, *_OWN_USER, "true"]):
        return (*_NAMESPACES, *_OWN_USER)
    return ()


@functools.cache
def _users() -> range | None:
    """Return user ids to run programs as, or None: those of this process."""
    if os.geteuid() != 0:
        return None
    probe = [sys.executable, "-I", "-c", "import ctypes, json, random"]
    for users in _USER_RANGES:
        if _works(probe, user=users.start, group=users.start, extra_groups=[], cwd="/"):
            return users
    return None


def _works(command: list[str], **options: object) -> bool:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10, **options)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
