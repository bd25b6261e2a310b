"""Run programs written by a model in a restricted process.

The process has limits and, where the system allows namespaces, no network. This is not a security
boundary: it can read what its user can read. Evaluate untrusted models in a container.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# Sets its limits, then runs the program. The word that means success is written only after the
# program's last line, so that an early exit does not pass.
_RUNNER = """
import os, resource, sys
seconds, memory, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def limit(name, value):
    resource.setrlimit(getattr(resource, name), (value, value))
limit("RLIMIT_CPU", seconds); limit("RLIMIT_AS", memory); limit("RLIMIT_FSIZE", 2**24)
limit("RLIMIT_NOFILE", 64); limit("RLIMIT_NPROC", 64); limit("RLIMIT_CORE", 0)
program = sys.stdin.read()
answer = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
try:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
except BaseException as error:
    os.write(answer, f"{type(error).__name__}: {error}".encode(errors="replace")[:500])
else:
    os.write(answer, word.encode())
os._exit(0)
"""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    result: str  # PASSED, FAILED or TIMED_OUT
    reason: str = ""


def run_program(source: str, *, timeout_s: float = 10.0, memory_bytes: int = 2**30) -> Verdict:
    """Run a Python program to its end.

    Args:
        source: the program; it passes if no exception ends it, not even SystemExit.
        timeout_s: limit of wall-clock seconds, and of CPU seconds, rounded up.
        memory_bytes: limit of the address space.

    Returns:
        How it ended; the process and its children have been terminated.
    """
    word = secrets.token_hex(16)
    arguments = [str(int(timeout_s) + 1), str(memory_bytes), word]
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        command = [*_prefix(), sys.executable, "-I", "-c", _RUNNER, *arguments]
        environment = {"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                answer, _ = process.communicate(source.encode(errors="replace"), timeout_s)
            except subprocess.TimeoutExpired:
                return Verdict(TIMED_OUT)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if answer == word.encode():
        return Verdict(PASSED)
    return Verdict(FAILED, answer.decode(errors="replace") or "the process was ended by a limit")


def is_isolated() -> bool:
    """Return whether programs run without network, in their own namespaces."""
    return bool(_prefix())


@functools.cache
def _prefix() -> tuple[str, ...]:
    try:
        subprocess.run([*_NAMESPACES, "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ()
    return _NAMESPACES
