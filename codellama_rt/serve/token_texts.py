"""The texts of single tokens, and log-probabilities, as clients get them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from codellama_rt.engine.logprobs import Logprob

_LEAST = -9999.0  # vLLM's number for minus infinity, which JSON does not have


def likelihood(logprob: Logprob) -> float:
    """Return a log-probability that JSON can have; also for NaN, of a model without weights."""
    return max(logprob.logprob, _LEAST) if logprob.logprob == logprob.logprob else _LEAST


class TokenTexts:
    """Texts by token id.

    Args:
        tokenizer: None: every text is empty.
        as_ids: "token_id:5" in place of texts, of which two may be equal.
    """

    def __init__(self, tokenizer: Any, *, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def __getitem__(self, token_id: int) -> str:
        """Return the text of a token; of half a character U+FFFD, of a control token its name."""
        if self._as_ids:
            return f"token_id:{token_id}"
        if self._tokenizer is None:
            return ""
        text = self.bytes(token_id)
        return text.decode("utf-8", "replace")

    def bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; of a control token those of its name."""
        text = self._tokenizer.token_bytes(token_id)
        return self._tokenizer.piece(token_id).encode() if text is None else text

    def by_text(self, row: Mapping[int, Logprob]) -> dict[str, float]:
        """Return the log-probabilities of a position by text; of equal texts the likeliest's."""
        found: dict[str, float] = {}
        for token_id, logprob in row.items():
            text, value = self[token_id], likelihood(logprob)
            found[text] = max(value, found.get(text, value))
        return found

    def named(self, rows: Iterable[Mapping[int, Logprob] | None]) -> list[Any]:
        """Return the log-probabilities of a prompt as vLLM has them."""
        return [
            None
            if row is None
            else {
                str(token_id): {
                    "logprob": likelihood(one),
                    "rank": one.rank,
                    "decoded_token": self[token_id],
                }
                for token_id, one in row.items()
            }
            for row in rows
        ]
