"""A checkpoint's own chat template as a format: rendered, then split at control tokens' names.

In a rendered template, names that the template wrote must become tokens and names that a user wrote
must not. So before rendering, a separator that no message contains is inserted into every name in a
message, and at an end of a message that could be part of a name. The names left in the rendered
text are the template's, and the separators are removed from the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codellama_rt.text.chat.messages import Message, texts_of
from codellama_rt.text.chat.sandbox import ChatTemplateError, render_template
from codellama_rt.text.tokenizer.tokenizer_config import ROLES

_ESCAPE = re.compile(r"\\u([ef][0-9a-f]{3})")  # JSON's of such a character
_PRIVATE_USE = range(0xE000, 0xF900)  # characters without an assigned meaning


class JinjaFormat:
    """The format defined by a template.

    Args:
        source: Jinja, as in tokenizer_config.json; it is rendered in a sandbox.

    Example:
        >>> style = JinjaFormat("{{ bos_token + messages[0]['content'] }}")
        >>> style.render(tokenizer, [Message("user", "a")])  # doctest: +SKIP
        '<s>a'
    """

    name = "template"

    def __init__(self, source: str) -> None:
        self.source = source

    def render(
        self, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, including the names of control tokens.

        Args:
            tokenizer: the checkpoint's; its bos_token and eos_token are used.
            messages: the conversation.
            add_generation_prompt: continue to where the assistant begins.

        Raises:
            ChatTemplateError: the template is faulty, forbidden, or rejects the conversation.
        """
        ids = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ROLES}
        names = {name: "" if i is None else tokenizer.piece(i) for name, i in ids.items()}
        return render_messages(self.source, messages, names, add_generation_prompt)

    def encode(
        self, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the prompt's ids; only names that the template itself writes become tokens.

        Args:
            tokenizer: with `special_names`, `encode_rendered(parts)`.
            messages: the conversation.
            add_generation_prompt: continue to where the assistant begins.

        Raises:
            ChatTemplateError: as for `render`, or the text is empty.
        """
        names = tokenizer.special_names
        separator = _separator(
            text for message in messages for text in texts_of([message.content, message.extra])
        )
        apart = [_all_set_apart(message, names, separator) for message in messages]
        text = self.render(tokenizer, apart, add_generation_prompt=add_generation_prompt)
        if not _without(separator, text):
            raise ChatTemplateError("chat template: it renders this conversation as no text")
        parts = tokenizer.split_special(text)
        return tokenizer.encode_rendered(
            [part if isinstance(part, int) else _without(separator, part) for part in parts]
        )

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids that end an answer, besides end-of-sequence."""
        return ()


def render_messages(
    source: str,
    messages: Sequence[Message],
    names: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """Render a template with the variables that templates expect, including `names`."""
    known = {
        "messages": [message.as_dict() for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    return render_template(source, known | dict(names))


def _separator(texts: Iterator[str]) -> str:
    used = set()
    for text in texts:
        used |= set(text)
        used |= {chr(int(code, 16)) for code in _ESCAPE.findall(text)}
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise ValueError(
        "messages contain every private-use character from U+E000 to U+F8FF; one must be free, to "
        "tell names of control tokens in messages from the template's"
    )


def _without(separator: str, text: str) -> str:
    """Remove the separator from a text, also where `tojson` has written it as \\ue000."""
    return text.replace(separator, "").replace(f"\\u{ord(separator):04x}", "")


def _all_set_apart(message: Message, names: Sequence[str], separator: str) -> Message:
    """Set every text apart that a message brings."""

    def apart(value: Any) -> Any:
        if isinstance(value, str):
            return _set_apart(value, names, separator)
        if isinstance(value, list):
            return [apart(item) for item in value]
        if isinstance(value, Mapping):
            return {apart_key(key): apart(item) for key, item in value.items()}
        return value

    def apart_key(key: str) -> str:
        # a template asks for some keys by name
        is_asked_for = key.isidentifier() and not any(name in key for name in names)
        return key if is_asked_for else apart(key)

    return Message(message.role, apart(message.content), apart(message.extra))


def _set_apart(content: str, names: Sequence[str], separator: str) -> str:
    """Insert separators so that the text has no name, nor part of one at its ends.

    White space stays outermost, so that the template's trim still finds it.
    """
    for name in names:
        content = content.replace(name, f"{name[0]}{separator}{name[1:]}")
    core = content.strip()
    if not core:
        return content
    begin = content.index(core)
    before, after = content[:begin], content[begin + len(core) :]
    if any(core in name or _overlaps(name, core) for name in names):
        before += separator
    if any(core in name or _overlaps(core, name) for name in names):
        after = separator + after
    return before + core + after


def _overlaps(left: str, right: str) -> bool:
    """Return whether some end of `left` is a beginning of `right`."""
    longest = min(len(left), len(right))
    return any(left.endswith(right[:size]) for size in range(1, longest + 1))
