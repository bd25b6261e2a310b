"""Log-probabilities as vLLM reports them: of the raw logits, before any processing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Logprob(NamedTuple):
    """A token's log-probability and rank (1 = likeliest; ties: the lower id goes first)."""

    logprob: float
    rank: int


class _RankedTokens(NamedTuple):
    token_ids: np.ndarray  # (1 + num_top,) int32: the requested token, then the likeliest ones
    logprobs: np.ndarray  # (1 + num_top,) float64
    rank: int  # of the requested token

    def as_dict(self) -> dict[int, Logprob]:
        asked, *top = zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True)
        found = {asked[0]: Logprob(asked[1], self.rank)}
        for rank, (token_id, logprob) in enumerate(top, start=1):
            found.setdefault(token_id, Logprob(logprob, rank))
        return found


class PromptLogprobs(Sequence):
    """One entry per prompt token: None for the first, then a dict as for a new token.

    Stored as arrays and turned into dicts on access: as dicts, 20 tokens per position would take
    half a gigabyte for a prompt of 100k tokens.
    """

    def __init__(self) -> None:
        """Start with the first token, which has no log-probability."""
        self._rows: list[_RankedTokens | None] = [None]

    def __len__(self) -> int:
        """Return the number of prompt tokens recorded so far."""
        return len(self._rows)

    def __getitem__(self, position):  # int -> dict or None, slice -> a list of them
        """Return the tokens reported at a position of the prompt."""
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        row = self._rows[position]
        return None if row is None else row.as_dict()

    def truncate(self, length: int) -> None:
        """Forget the tokens of the prompt after the first `length`."""
        del self._rows[length:]

    def append(self, logits: np.ndarray, token_id: int, num_top: int) -> None:
        """Add the next token of the prompt, given the logits before it."""
        self._rows.append(_rank_tokens(logits, token_id, num_top))


def token_logprobs(logits: np.ndarray, token_id: int, num_top: int) -> dict[int, Logprob]:
    """Return the log-probability of a token and of the likeliest ones.

    Args:
        logits: (vocab_size,) float32, as the model gave them.
        token_id: the chosen token.
        num_top: number of likeliest tokens to report besides.

    Returns:
        Token id -> Logprob; the chosen token first, then by rank.

    Example:
        >>> token_logprobs(np.float32([0, 0, 0, 0]), token_id=3, num_top=1)[3].rank
        4
    """
    return _rank_tokens(logits, token_id, num_top).as_dict()


def _rank_tokens(logits: np.ndarray, token_id: int, num_top: int) -> _RankedTokens:
    chosen = logits[token_id]
    rank = 1 + int((logits > chosen).sum()) + int((logits[:token_id] == chosen).sum())
    token_ids = np.array([token_id, *_likeliest(logits, num_top)], np.int32)
    scores = logits.astype(np.float64)
    highest = scores.max()
    log_total = highest + np.log(np.exp(scores - highest).sum())
    return _RankedTokens(token_ids, scores[token_ids] - log_total, rank)


def _likeliest(logits: np.ndarray, num_top: int) -> np.ndarray:
    if num_top == 0:
        return np.empty(0, np.int64)
    num_top = min(num_top, len(logits))
    threshold = np.partition(logits, -num_top)[-num_top]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:num_top]
