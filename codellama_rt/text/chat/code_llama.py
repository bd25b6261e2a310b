"""The two formats Code Llama Instruct was trained on, token by token as in Meta's code.

7B, 13B and 34B (`chat_completion` of the reference): each turn is one text "[INST] .. [/INST] .. "
between begin and end tokens; the system text is part of the first turn. 70B
(`dialog_prompt_tokens`): each message is a header and a body, encoded separately, and ends with the
control token <step>.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codellama_rt.text.chat.messages import Message

# A user who could write these could impersonate another role; Meta's code rejects them, too.
RESERVED = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")
STEP_PIECE = "<step>"


class InstFormat:
    """[INST] turns: Code Llama 7B, 13B and 34B Instruct, and Llama 2 Chat."""

    name = "code-llama"

    def encode(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's ids.

        Args:
            tokenizer: the model's, with bos_id and eos_id.
            messages: an optional system message, then user and assistant in turn, user last.

        Raises:
            ValueError: the roles do not alternate, or a content contains one of RESERVED.
        """
        *answered, last = self._turns(messages)
        ids: list[int] = []
        for turn in answered:
            ids += [tokenizer.bos_id, *tokenizer.encode_plain(turn), tokenizer.eos_id]
        return [*ids, tokenizer.bos_id, *tokenizer.encode_plain(last)]

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """Return the prompt as text with the names of control tokens, for display."""
        bos, eos = (tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        *answered, last = self._turns(messages)
        return "".join(f"{bos}{turn}{eos}" for turn in answered) + f"{bos}{last}"

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids that end an answer, besides end-of-sequence."""
        return ()

    def _turns(self, messages: Sequence[Message]) -> list[str]:
        messages = _plain_turns(messages)
        if messages[0].role == "system":
            system, messages = messages[0].content, list(messages[1:])
            if messages:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{messages[0].content}"
                messages[0] = Message(messages[0].role, content)
        _require_alternation(messages)
        turns = [f"[INST] {message.content.strip()} [/INST]" for message in messages[::2]]
        for i, message in enumerate(messages[1::2]):
            turns[i] += f" {message.content.strip()} "
        return turns


class StepFormat:
    """Headers and <step>: Code Llama 70B Instruct."""

    name = "code-llama-70b"

    def encode(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's ids, up to where the assistant begins.

        Args:
            tokenizer: the model's, with bos_id and a piece <step>.
            messages: an optional system message, then user and assistant in turn, user last.

        Raises:
            ValueError: as for `InstFormat`, or the vocabulary has no <step>.
        """
        [step] = self.end_ids(tokenizer)
        ids = [tokenizer.bos_id]
        for message in self._with_system(messages):
            ids += tokenizer.encode_plain(f" Source: {message.role}")
            if message.content:  # a missing system text is a message without a body
                ids += tokenizer.encode_plain(f"\n\n {message.content.strip()}")
            ids.append(step)
        ids += tokenizer.encode_plain(" Source: assistant\nDestination: user")
        return ids + tokenizer.encode_plain("\n\n ")

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """Return the prompt as text with the names of control tokens, for display."""
        parts = []
        for message in self._with_system(messages):
            body = f"\n\n {message.content.strip()}" if message.content else ""
            parts.append(f" Source: {message.role}{body}{STEP_PIECE}")
        bos = tokenizer.piece(tokenizer.bos_id)
        return f"{bos}{''.join(parts)} Source: assistant\nDestination: user\n\n "

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the ids that end an answer, besides end-of-sequence.

        Raises:
            ValueError: the vocabulary has no <step>.
        """
        step = tokenizer.piece_id(STEP_PIECE)
        if step is None:
            raise ValueError(
                "the turns of Code Llama 70B Instruct end with <step>, which is not in this "
                f"vocabulary; the format of the smaller models is {InstFormat.name!r}"
            )
        return (step,)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        messages = _plain_turns(messages)
        if messages[0].role != "system":
            messages = [Message("system", ""), *messages]
        _require_alternation(messages[1:])
        return list(messages)


def _plain_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, the system ones at the beginning as one; refuse what has no form."""
    _refuse_reserved(messages)
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    if first < 2:
        return list(messages)
    system = "\n\n".join(message.content for message in messages[:first])
    return [Message("system", system), *messages[first:]]


def _refuse_reserved(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if message.extra.get("tool_calls"):
            raise ValueError(
                f"messages[{i}] has tool_calls, which this chat format cannot express; give "
                "chat_template= as Jinja"
            )
        for tag in RESERVED:
            if tag in message.content:
                raise ValueError(
                    f"messages[{i}] contains {tag}, a chat format mark that no message may contain"
                )


def _require_alternation(messages: Sequence[Message]) -> None:
    """Check that user and assistant alternate, beginning and ending with user."""
    roles = [message.role for message in messages]
    expected = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != expected or not roles or roles[-1] != "user":
        raise ValueError(
            "a conversation is an optional system message, then alternating user and assistant, "
            f"user first and last; got {', '.join(roles) or 'nothing after the system message'}"
        )
