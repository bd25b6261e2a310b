"""Render untrusted Jinja templates from checkpoints safely.

jinja2's ImmutableSandboxedEnvironment keeps a template away from Python's internals. It runs in its
own process (`template_worker`) with limits on memory, time and output. One such process serves this
one; it is replaced when a template has ended it, when something else has, or when it holds more
memory than at its start, so that no template affects the next.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from codellama_rt.text.chat.template_names import require_json
from codellama_rt.text.chat.template_worker import OUT_OF_MEMORY, REPLY_HEADER

MAX_TEMPLATE = 200_000  # characters; the longest in use have some 20,000
MAX_TEXT = 8_000_000  # characters of the rendered text: 100k tokens are about 400,000
MAX_SECONDS = 3.0  # templates in use take milliseconds
MAX_MEMORY = 380 * 2**20  # bytes of address space of the worker; 30 MB before it renders
_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplateError(ValueError):
    """A chat template is damaged, does something forbidden, or rejects the conversation."""


class TemplateLimitError(ChatTemplateError):
    """A chat template exceeds a limit; whether it does may depend on the load of the machine."""


def render_template(source: str, names: Mapping[str, Any]) -> str:
    """Render an untrusted template.

    Args:
        source: Jinja.
        names: the variables it may use, of types that JSON supports.

    Raises:
        ChatTemplateError: it cannot be parsed, accesses something forbidden, exceeds a limit, or
            rejects its input by `raise_exception`.
        TypeError, ValueError: names that JSON does not support, or too many or too long ones.
        RuntimeError: the system refuses another process or file.
    """
    if len(source) > MAX_TEMPLATE:
        raise ChatTemplateError(
            f"chat template: at most {MAX_TEMPLATE} characters, got {len(source)}"
        )
    require_json(names)
    request = {
        "source": source,
        "names": dict(names),
        "seconds": MAX_SECONDS,
        "characters": MAX_TEXT,
    }
    encoded = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
    is_error, text = _shared.ask(encoded)
    if is_error:
        raise ChatTemplateError(text)
    return text


class _Worker:
    """A rendering process, started by the first request; threads use it one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: bytes) -> tuple[bool, str]:
        """Return whether the reply is an error, and its text.

        Raises:
            TemplateLimitError: the process has ended instead.
            RuntimeError: it cannot be started.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._process = _start()
            process = self._process
            try:
                is_error, is_last, text = _exchange(process, request)
            except OSError:
                process.wait()  # it closed its end of a pipe: it is terminating
                raise TemplateLimitError(_why_it_ended(process.returncode)) from None
            except BaseException:  # Ctrl-C, too: otherwise the next reply would be this request's
                self.stop()
                raise
            if is_last:
                self.stop()
            return is_error, text

    def stop(self) -> None:
        """Terminate the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            _close(process)

    def forget(self) -> None:
        """Leave the process to the parent: this process was forked from it."""
        if self._process is not None:
            _close(self._process)
            self._process.returncode = 0  # it is not a child of this process
        self._lock, self._process = threading.Lock(), None


def _start() -> subprocess.Popen:
    # -I and -S skip the user's environment and site packages, which saves time; modules are found
    # where this process finds them. A session of its own keeps Ctrl-C away from it.
    paths = [os.path.abspath(path) for path in sys.path]
    command = [sys.executable, "-I", "-S", str(_WORKER), json.dumps(paths), str(MAX_MEMORY)]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeError(
            f"chat template: the process that renders it cannot be started: {error.strerror}"
        ) from None


def _close(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()


def _exchange(process: subprocess.Popen, request: bytes) -> tuple[bool, bool, str]:
    """Return whether the reply is an error, whether it is the process's last, and its text."""
    left = memoryview(len(request).to_bytes(8, "little") + request)
    while left:
        left = left[process.stdin.write(left) :]
    size, is_error, is_last = REPLY_HEADER.unpack(_read(process, REPLY_HEADER.size))
    if size > 4 * MAX_TEXT:  # a character takes at most four bytes
        raise ChatTemplateError(f"chat template: it writes more than {MAX_TEXT} characters")
    return is_error, is_last, _read(process, size).decode("utf-8", "surrogatepass")


def _read(process: subprocess.Popen, size: int) -> bytearray:
    found = bytearray(size)
    left = memoryview(found)
    while left:
        count = process.stdout.readinto(left)
        if not count:
            raise BrokenPipeError
        left = left[count:]
    return found


def _why_it_ended(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"chat template: it computes for more than {MAX_SECONDS:g} seconds"
    if status == OUT_OF_MEMORY:
        return "chat template: it needs too much memory"
    return f"chat template: its process ended with status {status}; it may need too much memory"


_shared = _Worker()
atexit.register(_shared.stop)
os.register_at_fork(after_in_child=_shared.forget)
