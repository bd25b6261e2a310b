"""The text of a growing sequence, ended by stop strings wherever token boundaries fall."""

from collections.abc import Collection
from typing import Protocol


class Detokenizer(Protocol):
    """What a tokenizer's `detokenizer(prompt_ids)` returns."""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that has become final."""

    def flush(self) -> str:
        """Returns what is left, an incomplete character included."""


class TextStream:
    """Turns tokens into text, holding back what could still become a stop string.

    A stop string counts once its last character is there; of several that end together, the
    longest. So the text does not depend on how it was cut into tokens.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Collection[str]) -> None:
        """Starts with no text.

        Args:
            detokenizer: of this sequence.
            stop: strings that end the text.
        """
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""  # the end of the text so far that begins some stop string

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next token.

        Args:
            token_id: int.
            may_stop: False before `min_tokens`: stop strings completed now are only text.

        Returns:
            The text that is final now, and the stop string that follows it, if one does.
        """
        return self._release(self._detokenizer.push(token_id), may_stop)

    def flush(self) -> str:
        """The text left when the sequence has ended."""
        text, _ = self._release(self._detokenizer.flush(), may_stop=True)
        text, self._held = text + self._held, ""
        return text

    def _release(self, new_text: str, may_stop: bool) -> tuple[str, str | None]:
        if not self._stop:
            return new_text, None
        text = self._held + new_text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text] if may_stop else []
        if found:
            start, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[:start], stop
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
