"""The two formats Code Llama Instruct was trained on, token by token as Meta's code builds them.

7B, 13B and 34B (`chat_completion` of the reference): each turn is one text "[INST] .. [/INST] .. "
between begin and end tokens, the system text a part of the first. 70B (`dialog_prompt_tokens`):
each message is a header and a body, encoded apart, and ends with the control token <step>.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codellama_rt.text.chat.messages import Message

# A user who could write these would speak in another's name; Meta's code refuses them, too.
RESERVED = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")
STEP_PIECE = "<step>"


class InstFormat:
    """[INST] turns: Code Llama 7B, 13B and 34B Instruct, and Llama 2 Chat."""

    name = "code-llama"

    def encode(self, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids.

        Args:
            tokenizer: of the model, with bos_id and eos_id.
            messages: perhaps a system message, then user and assistant by turns, the user last.

        Raises:
            ValueError: the roles do not alternate, or a content holds one of RESERVED.
        """
        *answered, last = self._turns(messages)
        ids: list[int] = []
        for turn in answered:
            ids += [tokenizer.bos_id, *tokenizer.encode_plain(turn), tokenizer.eos_id]
        return [*ids, tokenizer.bos_id, *tokenizer.encode_plain(last)]

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The same as a text with the control tokens' names, for people to read."""
        bos, eos = (tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        *answered, last = self._turns(messages)
        return "".join(f"{bos}{turn}{eos}" for turn in answered) + f"{bos}{last}"

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """What ends an answer besides end-of-sequence."""
        return ()

    def _turns(self, messages: Sequence[Message]) -> list[str]:
        _refuse_reserved(messages)
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
        """The prompt's ids, up to where the assistant begins.

        Args:
            tokenizer: of the model, with bos_id and a piece <step>.
            messages: perhaps a system message, then user and assistant by turns, the user last.

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
        """The same as a text with the control tokens' names, for people to read."""
        parts = []
        for message in self._with_system(messages):
            body = f"\n\n {message.content.strip()}" if message.content else ""
            parts.append(f" Source: {message.role}{body}{STEP_PIECE}")
        bos = tokenizer.piece(tokenizer.bos_id)
        return f"{bos}{''.join(parts)} Source: assistant\nDestination: user\n\n "

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """What ends an answer besides end-of-sequence.

        Raises:
            ValueError: the vocabulary has no <step>.
        """
        step = tokenizer.piece_id(STEP_PIECE)
        if step is None:
            raise ValueError(
                "the turns of Code Llama 70B Instruct end with <step>, which this vocabulary "
                f"lacks; the format of the smaller models is {InstFormat.name!r}"
            )
        return (step,)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        _refuse_reserved(messages)
        if messages[0].role != "system":
            messages = [Message("system", ""), *messages]
        _require_alternation(messages[1:])
        return list(messages)


def _refuse_reserved(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        for tag in RESERVED:
            if tag in message.content:
                raise ValueError(
                    f"messages[{i}] holds {tag}, a mark of the chat format that no message may have"
                )


def _require_alternation(messages: Sequence[Message]) -> None:
    """User and assistant by turns, the user first and last."""
    roles = [message.role for message in messages]
    expected = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != expected or not roles or roles[-1] != "user":
        raise ValueError(
            "a conversation is at most one system message, then user and assistant by turns, the "
            f"user first and last; got {', '.join(roles) or 'nothing after the system message'}"
        )
