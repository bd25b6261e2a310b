"""Decode ids one by one, each character as soon as it is complete."""

import codecs
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Protocol


class Pieces(Protocol):
    """What decoding asks of a tokenizer.

    Attributes:
        decode_errors: how invalid UTF-8 decodes.
        whole_texts: texts of tokens that are whole characters and not special; filled while
            decoding, so that most tokens cost one look-up.
    """

    decode_errors: str
    whole_texts: dict[int, str]

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return a token's UTF-8 bytes, possibly part of a character; None if it is special."""

    def piece(self, token_id: int) -> str:
        """Return the name of a token."""

    def begins_text(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether what follows a prompt is the beginning of a text."""

    def lead_length(self, ids: Sequence[int]) -> int:
        """Return how many leading characters of the text of `ids` were added by the encoder."""


class IncrementalDetokenizer:
    """Decode ids one by one, each character as soon as it is complete.

    The joined pieces equal the decoded continuation, including a leading space; no text is taken
    back, and the cost of a push does not depend on the length.

    Example:
        >>> detokenizer = tokenizer.detokenizer(prompt_ids)  # doctest: +SKIP
        >>> text = "".join(map(detokenizer.push, new_ids)) + detokenizer.flush()  # doctest: +SKIP
    """

    def __init__(
        self, tokenizer: Pieces, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        """Start after `prompt_ids`; if those are only the begin token, a text starts here.

        With `skip_special_tokens` the begin token has no text; otherwise its name is before.
        """
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.decode_errors)
        self._at_start = skip_special_tokens and tokenizer.begins_text(prompt_ids)
        # A prompt may end inside a character; its at most three bytes are in the last three tokens.
        tail = takewhile(bool, map(tokenizer.token_bytes, reversed(prompt_ids[-3:])))
        self._decoder.decode(b"".join(reversed(list(tail))))
        self._whole_texts = tokenizer.whole_texts
        self._find_out_whether_between()

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now complete, possibly ""."""
        if self._is_between and (text := self._whole_texts.get(token_id)) is not None:
            return text
        text = self._decoded(token_id)
        self._find_out_whether_between()
        return text

    def _find_out_whether_between(self) -> None:
        """Note whether the next token begins a character, and is not the first of a text."""
        self._is_between = not (self._at_start or self._decoder.getstate()[0])

    def _decoded(self, token_id: int) -> str:
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            if self._skips_special:
                return ""
            piece = self._tokenizer.piece(token_id).encode()
        elif token_id not in self._whole_texts:
            with suppress(UnicodeDecodeError):
                self._whole_texts[token_id] = piece.decode()
        text = self._decoder.decode(piece)
        if self._at_start:
            self._at_start = False
            text = text[self._tokenizer.lead_length([token_id]) :]
        return text

    def flush(self) -> str:
        """End the text; bytes of an incomplete character become U+FFFD."""
        return self._decoder.decode(b"", final=True)
