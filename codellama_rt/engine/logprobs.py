"""Log-probabilities as vLLM reports them: of the raw logits, before any processing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codellama_rt import ops


class Logprob(NamedTuple):
    """A token's log-probability and rank (1 = likeliest; ties: the lower id goes first)."""

    logprob: float
    rank: int


class RankedTokens(NamedTuple):
    """A token with its rank, and the likeliest ones of the same row."""

    token_ids: np.ndarray  # (1 + num_top,) int32: the requested token, then the likeliest ones
    logprobs: np.ndarray  # (1 + num_top,) float64
    rank: int  # of the requested token

    def as_dict(self) -> dict[int, Logprob]:
        """Return token id -> Logprob; the requested token first, then by rank."""
        asked, *top = zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True)
        found = {asked[0]: Logprob(asked[1], self.rank)}
        for rank, (token_id, logprob) in enumerate(top, start=1):
            if token_id >= 0:  # there are none beside NaN
                found.setdefault(token_id, Logprob(logprob, rank))
        return found


class PromptLogprobs(Sequence):
    """One entry per prompt token: None for the first, then a dict as for a new token.

    Stored as arrays and turned into dicts on access: as dicts, 20 tokens per position would take
    half a gigabyte for a prompt of 100k tokens.
    """

    def __init__(self) -> None:
        """Start with the first token, which has no log-probability."""
        self._rows: list[RankedTokens | None] = [None]

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

    def extend(self, logits: np.ndarray, token_ids: Sequence[int], num_top: int) -> None:
        """Add the next tokens of the prompt, given the logits before each of them."""
        self._rows += rank_tokens(logits, token_ids, [num_top] * len(token_ids))


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
    return rank_tokens(logits[None], [token_id], [num_top])[0].as_dict()


def rank_tokens(
    logits: np.ndarray,
    token_ids: Sequence[int],
    num_top: Sequence[int],
    rows: Sequence[int] | None = None,
) -> list[RankedTokens]:
    """Rank tokens in rows of logits, all rows by one operator.

    Args:
        logits: (num_rows, vocab_size) float32.
        token_ids: (num_tokens,).
        num_top: (num_tokens,): how many of the likeliest tokens each one asks for besides.
        rows: (num_tokens,): each one's row; default: one after another.
    """
    asked = np.array(token_ids, np.int32)
    most = min(max(num_top, default=0), logits.shape[1])
    rows = np.arange(len(asked)) if rows is None else rows
    logprobs, ranks, top_ids = ops.token_logprobs(
        logits, asked, most, rows=np.asarray(rows, np.int32)
    )
    all_ids = np.concatenate((asked[:, None], top_ids), axis=1)
    return [
        RankedTokens(all_ids[i, : 1 + own], logprobs[i, : 1 + own], rank)
        for i, (own, rank) in enumerate(zip(num_top, ranks.tolist(), strict=True))
    ]
