"""The messages of a conversation, validated once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 10_000


class Message(NamedTuple):
    """A message with its role.

    Example:
        >>> Message("user", "Reverse a list in place.").role
        'user'
    """

    role: str
    content: str


def checked_messages(messages: Any) -> list[Message]:
    """Return a conversation as a list of messages, validated.

    Args:
        messages: mappings with "role" and "content", or Messages.

    Raises:
        TypeError: not such a list, or a content that is not a str.
        ValueError: no or too many messages, an unknown role, or half of a surrogate pair.

    Example:
        >>> checked_messages([{"role": "user", "content": "Hello"}])
        [Message(role='user', content='Hello')]
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(
            "messages must be a list of {'role': ..., 'content': ...}, "
            f"got {type(messages).__name__}"
        )
    first = islice(messages, MAX_MESSAGES + 1)  # an iterator may have no end
    checked = [_checked(i, message) for i, message in enumerate(first)]
    if not checked:
        raise ValueError("a conversation has at least one message, got none")
    if len(checked) > MAX_MESSAGES:
        raise ValueError(
            f"a conversation has at most {MAX_MESSAGES} messages, got more; drop the oldest"
        )
    return checked


def _checked(i: int, message: Any) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping):
        raise TypeError(
            f"messages[{i}] must be {{'role': ..., 'content': ...}}, got {type(message).__name__}"
        )
    unknown = sorted(set(message) - {"role", "content"}, key=str)
    if unknown:
        names = ", ".join(map(str, unknown))
        raise ValueError(f"messages[{i}] must have only role and content, got {names:.100}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{i}]: role must be one of {', '.join(ROLES)}, got {role!r:.40}")
    if not isinstance(content, str):
        raise TypeError(f"messages[{i}]: content must be a str, got {type(content).__name__}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"messages[{i}]: content must be Unicode, got half of a surrogate pair at {error.start}"
        ) from None
    return Message(role, content)
