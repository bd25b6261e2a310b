"""Jinja templates from checkpoints, which anybody may have written, rendered without harm.

jinja2's ImmutableSandboxedEnvironment keeps a template away from Python's insides. On top of it:
what it merely renders as nothing is refused aloud, only filters that chat templates use are there,
and a template can neither compute for ever nor fill the memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import Any

MAX_TEMPLATE = 200_000  # characters; the longest in use have some 20,000
MAX_TEXT = 32_000_000  # characters of any string while it renders: 100k tokens are about 400,000
MAX_LINES = 1_000_000  # lines of the compiled template that may run: about two seconds
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "round", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper",
)  # fmt: skip
# Methods that make a long text of a short one by a number, or format with fields of their own.
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"}


class ChatTemplateError(ValueError):
    """A chat template is damaged, does what it may not, or refuses the conversation."""


def render_template(source: str, names: Mapping[str, Any]) -> str:
    """Render a template that nobody vouches for.

    Args:
        source: Jinja.
        names: the variables it may use.

    Raises:
        ChatTemplateError: it cannot be parsed, reaches for what it may not, computes or grows
            without end, or refuses its input by `raise_exception`.
    """
    import jinja2

    if len(source) > MAX_TEMPLATE:
        raise ChatTemplateError(
            f"chat template: at most {MAX_TEMPLATE} characters, got {len(source)}"
        )
    try:
        template = _environment().from_string(source)
        # `a ~ b` is compiled to this name; it is the one way to grow that the sandbox cannot see.
        template.root_render_func.__globals__["str_join"] = _concatenated
        with _bounded_lines():
            return template.render(names)
    except ChatTemplateError:
        raise
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError,
            AttributeError, RecursionError, MemoryError) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ChatTemplateError(f"chat template: {reason:.300}") from None


@cache
def _environment() -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, (str, bytes)) and attr in _WIDENING:
                return False
            return not attr.startswith("_") and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            """No formatting at all: `is_safe_attribute` sees it then, and refuses."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is refused")

        def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
            _check_growth(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args)
            return super().call(__context, __obj, *args, **options)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_printed
    )
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.filters |= {
        "join": _joined, "replace": _replaced, "string": _text, "tojson": _tojson,
    }  # fmt: skip
    names = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals = names | {"raise_exception": _refuse, "strftime_now": _now}
    return environment


@contextmanager
def _bounded_lines() -> Iterator[None]:
    """Within, the code of templates may run MAX_LINES lines; loops inside C calls are bounded by
    the sizes of what they run over.
    """
    left = MAX_LINES
    before = sys.gettrace()

    def count(frame: Any, event: str, argument: Any) -> Callable | None:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise ChatTemplateError(f"chat template: it computes more than {MAX_LINES} steps")
        return count

    def enter(frame: Any, event: str, argument: Any) -> Callable | None:
        return count if frame.f_code.co_filename == "<template>" else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    sized = [len(value) for value in (left, right) if hasattr(value, "__len__")]
    numbers = [abs(value) for value in (left, right) if isinstance(value, (int, float))]
    if operator == "%" and isinstance(left, (str, bytes)):
        raise ChatTemplateError("chat template: formatting with % is refused")
    if operator == "+" and len(sized) == 2:
        _check_length(sum(sized))
    elif operator == "*" and sized and numbers:
        _check_length(sized[0] * numbers[0])
    elif operator in ("*", "**") and any(number > 2**64 for number in numbers):
        raise ChatTemplateError("chat template: a number is too large")
    elif operator == "**" and numbers and numbers[-1] > 64:
        raise ChatTemplateError("chat template: an exponent is above 64")


def _check_growth(name: str, text: Any, arguments: tuple[Any, ...]) -> None:
    """The methods whose result may be longer than what goes in."""
    if not isinstance(text, str):
        return
    if name == "replace" and len(arguments) >= 2:
        _check_replacement(text, *arguments[:2])
    elif name == "join" and arguments:
        if not isinstance(arguments[0], (list, tuple, str)):
            raise ChatTemplateError("chat template: join takes a list")
        parts = [len(part) for part in arguments[0] if isinstance(part, str)]
        _check_length(sum(parts) + len(parts) * len(text))


def _check_replacement(text: str, old: Any, new: Any) -> None:
    _check_length(len(text) + (text.count(str(old)) + 1) * len(str(new)))


def _check_length(length: float) -> None:
    if length > MAX_TEXT:
        raise ChatTemplateError(f"chat template: a text grows beyond {MAX_TEXT} characters")


def _text(value: Any) -> str:
    """str() of what is not so nested that it would have no end."""
    left, open_values = MAX_LINES, [value]
    while open_values:
        left -= 1
        if left < 0:
            raise ChatTemplateError("chat template: a value has too many parts to be text")
        item = open_values.pop()
        if isinstance(item, Mapping):
            open_values += item.values()
        elif isinstance(item, (list, tuple, set)):
            open_values += item
    text = str(value)
    _check_length(len(text))
    return text


def _printed(value: Any) -> Any:
    return _text(value) if isinstance(value, (Mapping, list, tuple, set)) else value


def _concatenated(parts: Any) -> str:
    texts = [_text(part) for part in parts]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _joined(value: Any, d: str = "", attribute: str | None = None) -> str:
    items = [item[attribute] if attribute else item for item in value]
    texts = [_text(item) for item in items]
    _check_length(len(texts) * len(str(d)) + sum(map(len, texts)))
    return str(d).join(texts)


def _replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    text = _text(text)
    _check_replacement(text, old, new)
    return text.replace(str(old), str(new), count)


def _tojson(value: Any, indent: int | None = None) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise ChatTemplateError(f"chat template: indent must be 0 to 16, got {indent}")
    _text(value)
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses this conversation: {message!s:.300}")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
