"""A repository's own chat template as a format: rendered, then cut at the control tokens' names.

A rendered template is one text in which the names that the template wrote must become tokens and
those that a user wrote must not. So before rendering a separator that no message has is put into
every name in a message, and at an end of a message that could be a part of one; the names left in
the rendered text are the template's, and the separators are taken out of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codellama_rt.text.chat.messages import Message
from codellama_rt.text.chat.sandbox import ChatTemplateError, render_template

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that mean nothing to anybody


class JinjaFormat:
    """The format that a template describes.

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
        """The text of a conversation, names of control tokens included.

        Args:
            tokenizer: of the checkpoint, for its bos_token and eos_token.
            messages: the conversation.
            add_generation_prompt: go on to where the assistant begins.

        Raises:
            ChatTemplateError: the template is faulty, forbidden, or refuses the conversation.
        """
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {name: "" if i is None else tokenizer.piece(i) for name, i in ids.items()}
        return render_messages(self.source, messages, names, add_generation_prompt)

    def encode(
        self, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt's ids; only what the template itself writes becomes control tokens.

        Args:
            tokenizer: with `special_names`, `encode_rendered(parts)`.
            messages: the conversation.
            add_generation_prompt: go on to where the assistant begins.

        Raises:
            ChatTemplateError: as `render`, or it writes no begin of a text at all.
        """
        names = tokenizer.special_names
        separator = _separator(message.content for message in messages)
        apart = [
            Message(message.role, _set_apart(message.content, names, separator))
            for message in messages
        ]
        text = self.render(tokenizer, apart, add_generation_prompt=add_generation_prompt)
        if not text.replace(separator, ""):
            raise ChatTemplateError("chat template: it renders this conversation as no text")
        parts = tokenizer.split_special(text)
        return tokenizer.encode_rendered(
            [part if isinstance(part, int) else part.replace(separator, "") for part in parts]
        )

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """What ends an answer besides end-of-sequence."""
        return ()


def render_messages(
    source: str, messages: Sequence[Message], names: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:  # fmt: skip
    """Render a template with the variables that templates expect, `names` among them."""
    known = {
        "messages": [message._asdict() for message in messages],
        "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None,
    }  # fmt: skip
    return render_template(source, known | dict(names))


def _separator(texts: Iterator[str]) -> str:
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _set_apart(content: str, names: Sequence[str], separator: str) -> str:
    """A text in which no name stands, nor begins or ends; white space stays outermost, for trim."""
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
    """Whether some end of `left` is a beginning of `right`."""
    longest = min(len(left), len(right))
    return any(left.endswith(right[:size]) for size in range(1, longest + 1))
