"""Check the variables of a chat template before they are sent to the process that renders it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 8_000_000  # of all texts together: 100k tokens are about 400,000
MAX_VALUES = 1_000_000
MAX_DEPTH = 64  # JSON schemas of tools have some ten levels


def require_json(names: Mapping[str, Any]) -> None:
    """Check that variables are of JSON's types, and within the limits above.

    Raises:
        TypeError: a value of another type, or a key that is not a str.
        ValueError: NaN or an infinity; too many values, too long or too deep ones; a value that
            contains itself.

    Example:
        >>> require_json({"tools": None, "messages": [{"role": "user", "content": "Hello"}]})
    """
    pending: list[tuple[Any, int]] = [(dict(names), 0)]
    values = characters = 0
    while pending:
        value, depth = pending.pop()
        if isinstance(value, (dict, list, tuple)):
            values += len(value)
            _require(values <= MAX_VALUES, f"{MAX_VALUES} values at most")
            _require(depth < MAX_DEPTH, f"{MAX_DEPTH} levels at most, none that contains itself")
            if isinstance(value, dict):
                characters += sum(len(_key(key)) for key in value)
                value = value.values()
            pending += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            characters += len(value)
        elif isinstance(value, float):
            _require(math.isfinite(value), f"finite numbers, got {value}")
        elif not (value is None or isinstance(value, int)):
            raise TypeError(
                f"chat template: variables must be of JSON's types, got {type(value).__name__}"
            )
        _require(characters <= MAX_CHARACTERS, f"{MAX_CHARACTERS} characters at most")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"chat template: keys of variables must be str, got {type(key).__name__}")
    return key


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"chat template: variables must have {expected}")
