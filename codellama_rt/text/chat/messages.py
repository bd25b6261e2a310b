"""The messages of a conversation, validated once, as clients of OpenAI's API write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool", "function")
MAX_MESSAGES = 10_000
_MAX_DEPTH = 32  # of lists and objects in a message: calls of tools have some 5
_SAME_ROLES = {"developer": "system"}  # what OpenAI calls a system message since its o1


class Message(NamedTuple):
    """A message with its role.

    Attributes:
        role: one of `ROLES`.
        content: its text, "" for none.
        extra: what else was given ("name", "tool_calls", ...), JSON that templates may use.

    Example:
        >>> Message("user", "Reverse a list in place.").role
        'user'
    """

    role: str
    content: str
    extra: Mapping[str, Any] = MappingProxyType({})

    def as_dict(self) -> dict[str, Any]:
        """Return the message as clients write it."""
        return {"role": self.role, "content": self.content, **self.extra}


def checked_messages(messages: Any) -> list[Message]:
    """Return a conversation as a list of messages, validated.

    Args:
        messages: mappings with "role" and "content", or Messages. A content is a str, a list of
            {"type": "text", "text": ...}, or None; other keys are for templates. The role
            "developer" is another name of "system".

    Raises:
        TypeError: not such a list, or a value that JSON does not have.
        ValueError: no or too many messages, an unknown role, a part that is not text, or half of a
            surrogate pair.

    Example:
        >>> checked_messages([{"role": "user", "content": "Hello"}])[0].content
        'Hello'
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(
            "messages must be a list of {'role': ..., 'content': ...}, "
            f"got {type(messages).__name__}"
        )
    first = islice(messages, MAX_MESSAGES + 1)  # an iterator may have no end
    checked = [_checked(f"messages[{i}]", message) for i, message in enumerate(first)]
    if not checked:
        raise ValueError("a conversation has at least one message, got none")
    if len(checked) > MAX_MESSAGES:
        raise ValueError(
            f"a conversation has at most {MAX_MESSAGES} messages, got more; drop the oldest"
        )
    return checked


def _checked(where: str, message: Any) -> Message:
    if isinstance(message, Message):
        message = message.as_dict()
    if not isinstance(message, Mapping):
        raise TypeError(
            f"{where} must be {{'role': ..., 'content': ...}}, got {type(message).__name__}"
        )
    extra = _plain(where, message)
    if "content" not in extra and not extra.get("tool_calls"):
        raise TypeError(f"{where}: content must be a str, got nothing")
    role, content = extra.pop("role", None), _text(where, extra.pop("content", None))
    role = _SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r:.40}")
    for text in texts_of([content, extra]):
        _require_unicode(where, "content" if text is content else "a text", text)
    return Message(role, content, extra)


def _require_unicode(where: str, what: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} must be Unicode, got half of a surrogate pair at {error.start}"
        ) from None


def _text(where: str, content: Any) -> str:
    """Return a content as one text; parts of text become its lines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(f"{where}: content must be a str, got {type(content).__name__}")
    parts = [part if isinstance(part, str) else _text_of_part(where, part) for part in content]
    return "\n".join(parts)


def _text_of_part(where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type", "text") not in ("text", "input_text"):
        raise ValueError(f"{where}: a part of content must be text, got {part!r:.60}")
    return text


def _plain(where: str, value: Any, depth: int = 0) -> Any:
    """Return a value of JSON's kinds as dicts, lists, strings and numbers of its own."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} must be nested at most {_MAX_DEPTH} deep")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(where, item, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(where, item, depth + 1) for key, item in value.items()}
    raise TypeError(f"{where} must have values of JSON only, got {type(value).__name__}")


def texts_of(value: Any) -> Iterator[str]:
    """Yield all strings in a value of JSON's kinds, names of an object's entries included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
