"""What ends an output: tokens, and stop strings wherever token boundaries fall in its text."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from codellama_rt.model.config import ModelConfig


class Detokenizer(Protocol):
    """The object that a tokenizer's `detokenizer(prompt_ids)` returns."""

    def push(self, token_id: int) -> str:
        """Take a token and return the text that has become final."""

    def flush(self) -> str:
        """Return the remaining text, including an incomplete character."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer.

    Attributes:
        end_ids: tokens that end every answer.
    """

    end_ids: Collection[int]

    def filling_end(self, prompt_ids: Sequence[int]) -> int | None:
        """Return the token that ends what follows a prompt that asks for a filling, else None."""

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token, which has no text, by its name; None: no such token."""

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """Return an incremental decoder for the tokens that follow a prompt."""

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that continues another."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return a token's UTF-8 bytes, possibly part of a character; None if it is special."""

    def begins_text(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether the first token after a prompt loses the space of its `lead_length`."""

    def lead_length(self, ids: Sequence[int]) -> int:
        """Return how many leading characters of the text of `ids` were added by the encoder."""


def bad_word_runs(
    words: Collection[str], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """Return the tokens of words that must not be written, with and without a space in front.

    Args:
        words: none of them empty.
        tokenizer: needed if there are words.
        vocab_size: of the model; a run with a token beyond it can never be complete.
    """
    bare = dict.fromkeys(word.lstrip(" ") or word for word in words)
    texts = [lead + word for word in bare for lead in ("", " ")]
    runs = [tokenizer.encode_continuation(text) for text in texts]
    return [run for run in runs if max(run) < vocab_size]


def end_token_ids(
    config: ModelConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return every token that some part of a checkpoint names as an end, each once.

    Checkpoints that were tuned for conversations often name the end of a turn in one place only.

    Args:
        config: of the model; ids without a row in it are left out.
        generation_config: its "eos_token_id" comes first.
        tokenizer: with `end_ids`, which come last; or None.
    """
    stated = generation_config.get("eos_token_id") or ()
    stated = (stated,) if isinstance(stated, int) else stated
    further = () if tokenizer is None else sorted(tokenizer.end_ids)
    ids = dict.fromkeys((*stated, *config.eos_token_ids, *further))
    return tuple(token_id for token_id in ids if token_id < config.vocab_size)


def control_tokens(
    stop: Iterable[str], tokenizer: Tokenizer | None, vocab_size: int
) -> dict[int, str]:
    """Return the stop strings that name control tokens, by id: no text would ever hold them."""
    ids = {} if tokenizer is None else {name: tokenizer.control_id(name) for name in stop}
    return {i: name for name, i in ids.items() if i is not None and i < vocab_size}


class TextStream:
    """Turn tokens into text, holding back what could still become a stop string.

    A stop string counts once its last character has arrived; of several that end together, the
    longest counts. So the text does not depend on how it was split into tokens.

    Attributes:
        text_of: takes a token and returns the text that is now final; None: only `push` does, as
            there are stop strings.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Collection[str], *, keeps_stop: bool = False
    ) -> None:
        """Start with no text.

        Args:
            detokenizer: of this sequence.
            stop: strings that end the text.
            keeps_stop: the string that ends the text is part of it.
        """
        self._detokenizer = detokenizer
        self.text_of = None if stop else detokenizer.push
        self._stop = stop
        self._keeps_stop = keeps_stop
        self._held = ""  # the end of the text so far that could begin a stop string

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take the next token.

        Args:
            token_id: int.
            may_stop: False before `min_tokens`: stop strings completed now are plain text.

        Returns:
            The text that is now final, and the stop string that ends it or follows it, if any.
        """
        text = self._detokenizer.push(token_id)
        return self._release(text, may_stop) if self._stop else (text, None)

    def flush(self) -> str:
        """Return the text left when the sequence has ended."""
        text = self._detokenizer.flush()
        if self._stop:
            text, _ = self._release(text, may_stop=True)
        text, self._held = text + self._held, ""
        return text

    def _release(self, new_text: str, may_stop: bool) -> tuple[str, str | None]:
        text = self._held + new_text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text] if may_stop else []
        if found:
            start, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: start + len(stop) * self._keeps_stop], stop
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
