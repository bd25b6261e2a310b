"""What an output must be, with vLLM's names, validated when it is created."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_CHARACTERS = 2**18  # of a specification; OpenAI allows 120,000 in a schema
MAX_CHOICES = 4096


@dataclass(frozen=True)
class StructuredOutputs:
    """A form that the whole output has; exactly one kind is given.

    Args:
        json: a JSON schema, as a mapping or as text; stored as text. Properties come in its order.
        regex: a regular expression that matches the whole output.
        choice: strings, one of which the output is.
        grammar: in Lark's or GBNF's notation.
        json_object: True: any JSON object.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: none or several are given, one is too long, or `json` is no JSON object.

    Example:
        >>> StructuredOutputs(json={"type": "integer"}).json
        '{"type": "integer"}'
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        """Validate, and make the values immutable."""
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise _wrong_type("json_object", "a bool or None", self.json_object)
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            found = " and ".join(given) or "none"
            raise ValueError(f"StructuredOutputs: give exactly one of {names}, got {found}")
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        if self.choice is not None:
            self._set("choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))

    @property
    def kind(self) -> str:
        """The name of the value that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for callers; normalised once, here


def _schema_text(schema: object) -> str:
    if not isinstance(schema, (str, Mapping)):
        raise _wrong_type("json", "a JSON schema as a mapping or a str", schema)
    if isinstance(schema, str):
        _check_text("json", schema)
    try:
        contents = json.loads(schema) if isinstance(schema, str) else dict(schema)
        text = json.dumps(contents, allow_nan=False)
    except RecursionError:
        raise ValueError("StructuredOutputs: json must not be nested so deeply") from None
    except ValueError as error:
        raise ValueError(f"StructuredOutputs: json must be a JSON schema: {error}") from None
    if not isinstance(contents, dict):
        kind = type(contents).__name__
        raise ValueError(f"StructuredOutputs: json must hold an object (a schema), got {kind}")
    _check_text("json", text)
    return text


def _choices(given: object) -> tuple[str, ...]:
    if not isinstance(given, (tuple, list)):
        raise _wrong_type("choice", "a list of str", given)
    for i, choice in enumerate(given):
        if not isinstance(choice, str):
            raise _wrong_type(f"choice[{i}]", "a str", choice)
    if not 1 <= len(given) <= MAX_CHOICES:
        raise ValueError(
            f"StructuredOutputs: choice must hold 1 to {MAX_CHOICES} strings, got {len(given)}"
        )
    if not any(given):
        raise ValueError("StructuredOutputs: choice must hold a string that is not empty")
    _check_text("choice", "".join(given))
    return tuple(given)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise _wrong_type(name, "a str", text)
    if not text:
        raise ValueError(f"StructuredOutputs: {name} must not be empty")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"StructuredOutputs: {name} must have at most {MAX_CHARACTERS} characters, "
            f"got {len(text)}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"StructuredOutputs: {name} holds half of a surrogate pair") from None


def _wrong_type(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"StructuredOutputs: {name} must be {expected}, got {type(value).__name__}")
