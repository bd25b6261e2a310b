"""Render chat templates in a separate process, which `sandbox` starts by this file's path.

The process imports only jinja2 and the standard library. Everything an operator, a filter or the
compiler does is bounded by the operating system: RLIMIT_AS bounds the memory, and a timer whose
signal ends the process bounds the time, even in the middle of a C call.

A request and its reply are JSON in a frame: eight bytes of length, least significant first, then
the text. `{"source", "names", "seconds", "characters"}` is answered by `{"text"}` or `{"error"}`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, ClassVar

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
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    compiled = lru_cache(2)(environment.from_string)  # the next turn has the same template
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while (request := _read_frame(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request.pop("seconds"))
        reply = _answer(compiled, **request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


def _read_frame(file: BinaryIO) -> Any:
    header = file.read(8)
    if not header:
        return None
    return json.loads(file.read(int.from_bytes(header, "little")).decode("utf-8", "surrogatepass"))


def _answer(compiled: Any, source: str, names: dict[str, Any], characters: int) -> bytes:
    from jinja2 import TemplateError

    try:
        text = compiled(source).render(names)
        if len(text) > characters:
            raise ValueError(f"it writes more than {characters} characters")
        return _encoded({"text": text})
    except RefusalError as refusal:
        return _encoded({"error": f"the chat template refuses this conversation: {refusal}"})
    except MemoryError:
        return _encoded({"error": "chat template: it needs too much memory"})
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return _encoded({"error": f"chat template: {reason:.300}"})


def _encoded(reply: dict[str, str]) -> bytes:
    return json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")


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
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
