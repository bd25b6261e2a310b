"""Find the chat format of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from codellama_rt.checkpoint.formats.gguf_file import find_gguf_metadata
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.errors import CheckpointError
from codellama_rt.text.chat.code_llama import STEP_PIECE, InstFormat, StepFormat
from codellama_rt.text.chat.jinja_format import JinjaFormat, render_messages
from codellama_rt.text.chat.messages import Message
from codellama_rt.text.chat.sandbox import ChatTemplateError, TemplateLimitError


class ChatFormat(Protocol):
    """How a conversation becomes a prompt."""

    name: str

    def encode(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's ids."""

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """Return the prompt as text."""

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids that end an answer, besides end-of-sequence."""


NATIVE = {style.name: style for style in (InstFormat, StepFormat)}


def find_format(chat_template: str | None, tokenizer: Any) -> ChatFormat:
    """Return the chat format of a checkpoint.

    Args:
        chat_template: "code-llama", "code-llama-70b", or Jinja; None: decide by the vocabulary.
        tokenizer: the checkpoint's.

    Returns:
        Meta's own format, also for a template that renders the same: its ids are those the model
        was trained on, while rendered text loses boundaries between pieces. Else the template.

    Raises:
        TypeError: chat_template is not a str.
        ValueError: there is no template, and the vocabulary is not Code Llama's; or the template
            exceeds a limit.
    """
    if chat_template is None:
        return _format_of_vocabulary(tokenizer)
    if not isinstance(chat_template, str):
        raise TypeError(f"chat_template must be a str, got {type(chat_template).__name__}")
    if chat_template in NATIVE:
        return NATIVE[chat_template]()
    if _is_step_template(chat_template):
        return StepFormat()
    is_metas = _has_metas_tokens(tokenizer) and _is_inst_template(chat_template)
    return InstFormat() if is_metas else JinjaFormat(chat_template)


def read_chat_template(path: Path, metadata: Mapping[str, Any] | None = None) -> str | None:
    """Return the template that a checkpoint brings, or None.

    Args:
        path: a GGUF file, which may hold it; a directory, or a file in it, where it is
            chat_template.jinja or an entry of tokenizer_config.json.
        metadata: of the GGUF file at `path`, where it has been read already.

    Raises:
        CheckpointError: it is not text, or there are several and none is the default.
    """
    if metadata is None and path.is_file():
        metadata = find_gguf_metadata(path)
    if metadata is not None:
        return _default_of(metadata.get("tokenizer.chat_template"), str(path))
    folder = path.parent if path.is_file() else path
    if (folder / "chat_template.jinja").is_file():
        return _utf8(folder / "chat_template.jinja")
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template") if config.is_file() else None
    return _default_of(found, str(config))


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected UTF-8, found {error.reason}") from None


def _default_of(found: Any, source: str) -> str | None:
    """Return the only template, or of several the one named "default"."""
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", found)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{source}: chat_template: expected a text, or several of which one is named "
            f"'default', found {json.dumps(found, default=str):.100}"
        )
    return found


def _format_of_vocabulary(tokenizer: Any) -> ChatFormat:
    if tokenizer.piece_id(STEP_PIECE) is not None:
        return StepFormat()
    if tokenizer.piece_id("<s>") is not None and tokenizer.piece_id("<0x0A>") is not None:
        return InstFormat()  # Llama's SentencePiece vocabulary
    raise ValueError(
        "this checkpoint has no chat template, and its vocabulary is not Code Llama's; give "
        f"chat_template=, Jinja or one of {', '.join(NATIVE)}"
    )


_QUESTION = [Message("user", "q1")]
_DIALOG = [*_QUESTION, Message("assistant", "a1"), Message("user", "q2")]
_INST_TEXTS = {  # `InstFormat`'s texts, to compare with what a template renders
    "<s>[INST] q1 [/INST]": _QUESTION,
    "<s>[INST] q1 [/INST] a1 </s><s>[INST] q2 [/INST]": _DIALOG,
    "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq1 [/INST]": [Message("system", "s"), *_QUESTION],
}


def _is_inst_template(source: str) -> bool:
    return "[INST]" in source and all(
        _rendered(source, dialog) == text for text, dialog in _INST_TEXTS.items()
    )


def _has_metas_tokens(tokenizer: Any) -> bool:
    """Return whether turns begin and end as in Meta's code: ids a fine-tune has been trained on.

    One with another end of a turn, or without a space after it ("legacy": false), has others.
    """
    around = [
        None if i is None else tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id)
    ]
    return around == ["<s>", "</s>"] and tokenizer.config.spacing in ("start", "each")


def _is_step_template(source: str) -> bool:
    """Return whether it renders the turns of 70B; Hugging Face's spaces differ from Meta's."""
    if STEP_PIECE not in source:
        return False
    text = _rendered(source, [Message("system", "s"), *_QUESTION]) or ""
    words = "Source: system s <step> Source: user q1 <step> Source: assistant Destination: user"
    return text.removeprefix("<s>").split() == words.split()


def _rendered(source: str, dialog: Sequence[Message]) -> str | None:
    try:
        return render_messages(source, dialog, {"bos_token": "<s>", "eos_token": "</s>"})
    except TemplateLimitError:  # says nothing of the format, and may come from a busy machine
        raise
    except ChatTemplateError:
        return None
