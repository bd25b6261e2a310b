"""Render chat templates in a separate process, which `sandbox` starts by this file's path.

The process imports only jinja2 and the standard library. Everything an operator, a filter or the
compiler does is bounded by the operating system: RLIMIT_AS bounds the memory, and a timer whose
signal ends the process bounds the time, even in the middle of a C call. It counts the time of the
CPU alone, so that a busy machine ends no template that is not at fault.

A request is eight bytes of length, least significant first, and JSON of `{"source", "names",
"seconds", "characters"}`. Its reply is a `REPLY_HEADER` (bytes of text, whether it is an error,
whether the process ends with it) and the text. A process without memory ends with OUT_OF_MEMORY.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, ClassVar

REPLY_HEADER = struct.Struct("<Q??")
OUT_OF_MEMORY = 112  # the exit status; no other way to end has it
_MAX_RETAINED = 2**25  # bytes a template may leave behind: compiled, cyclic, or fragments

_FILTERS = (
    "abs batch capitalize center count d default dictsort e escape first float format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "round safe select selectattr slice sort string sum title trim truncate unique upper wordcount "
    "wordwrap"
)
_GLOBALS = ("range", "dict", "namespace")


class RefusalError(ValueError):
    """The template rejects its input."""


def main(paths: list[str], memory: int) -> None:
    """Answer requests until the input ends.

    Args:
        paths: `sys.path` for imports.
        memory: bytes of address space that the process may use.
    """
    sys.path[:] = paths
    environment = _environment()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory)
    compiled = lru_cache(2)(environment.from_string)  # the next turn has the same template
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    at_start, is_last = _address_space(), False
    while not is_last and (request := _read_frame(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        is_error, text = _answer(compiled, **request)
        reply = text.encode("utf-8", "surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        del request, text
        is_last = _address_space() - len(reply) > at_start + _MAX_RETAINED
        replies.write(REPLY_HEADER.pack(len(reply), is_error, is_last))
        replies.write(reply)
        replies.flush()
        del reply


def _limit(which: int, value: int) -> None:
    """Set a limit of this process, or keep a lower one that it was started with."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _address_space() -> int:
    """Return the bytes that RLIMIT_AS counts (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read_frame(file: BinaryIO) -> Any:
    header = file.read(8)
    if not header:
        return None
    return json.loads(file.read(int.from_bytes(header, "little")).decode("utf-8", "surrogatepass"))


def _answer(compiled: Any, source: str, names: dict[str, Any], characters: int) -> tuple[bool, str]:
    """Return whether the template failed, and the text it renders or the reason.

    Raises:
        MemoryError: there is none left, perhaps not even for the reason.
    """
    try:
        text = compiled(source).render(names)
        if len(text) > characters:
            raise ValueError(f"it writes more than {characters} characters")
        return False, text
    except RefusalError as refusal:
        return True, f"the chat template refuses this conversation: {refusal}"
    except MemoryError:
        raise
    except Exception as error:  # whatever jinja2, the compiler or a filter raises
        reason = " ".join(str(error).split()) or type(error).__name__
        return True, f"chat template: {reason:.300}"


def _environment() -> Any:
    """Return jinja2's immutable sandbox, changed so that forbidden access raises.

    jinja2 itself renders it as nothing. Only the filters and globals that chat templates use exist.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Environment(ImmutableSandboxedEnvironment):
        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not attr.startswith("_") and super().is_safe_attribute(obj, attr, value)

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is refused")

    class Generation(Extension):
        """The block around an answer, by which training finds it: it renders as what is in it."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters = {name: environment.filters[name] for name in _FILTERS.split()}
    environment.filters["tojson"] = _tojson
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise RefusalError(f"{message!s:.300}")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), int(sys.argv[2]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
