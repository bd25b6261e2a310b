"""The integers a model step needs, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(slots=True)
class Batch:
    """The tokens of one step; int32, C-contiguous. `slot = block_id * block_size + offset`.

    Args:
        token_ids: (num_tokens,), the chunks one after another.
        positions: (num_tokens,) of each token in its sequence.
        cu_seqlens_q: (num_seqs + 1,); tokens [cu[i], cu[i + 1]) are those of chunk i.
        seq_lens: (num_seqs,) tokens in the cache after this step.
        block_tables: (num_seqs, max_blocks), padded with -1.
        slot_mapping: (num_tokens,), where each token's key and value go.
        logit_rows: (num_logits,) indices into num_tokens.
        rope_lengths: (num_tokens,) lengths that set a dynamic RoPE's base; None for other models.
        adapted: pairs of a LoraAdapter and the indices of its tokens, (count,) int64.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray
    logit_rows: np.ndarray
    rope_lengths: np.ndarray | None = None
    adapted: tuple[tuple[object, np.ndarray], ...] = ()

    def wanted(self) -> Wanted | None:
        """Return what the last layer has to compute for `logit_rows`; None: all tokens.

        Example:
            >>> import numpy as np
            >>> ints = lambda *values: np.array(values, np.int32)
            >>> batch = Batch(ints(5, 6, 7, 8), ints(0, 1, 2, 0), ints(0, 3, 4), ints(3, 1),
            ...               np.int32([[0], [1]]), ints(0, 1, 2, 16), logit_rows=ints(2))
            >>> wanted = batch.wanted()
            >>> wanted.tokens, wanted.cu_seqlens_q
            (array([2]), array([0, 1, 1], dtype=int32))
        """
        if len(self.logit_rows) == len(self.token_ids):
            return None
        ends = self.cu_seqlens_q[1:]
        chunks = np.searchsorted(ends, self.logit_rows, side="right")  # (num_logits,)
        firsts = ends.copy()
        np.minimum.at(firsts, chunks, self.logit_rows)
        cu_seqlens_q = np.zeros_like(self.cu_seqlens_q)
        np.cumsum(ends - firsts, out=cu_seqlens_q[1:])
        shifts = firsts - cu_seqlens_q[:-1]
        tokens = np.arange(cu_seqlens_q[-1]) + shifts.repeat(ends - firsts)
        adapted = [(adapter, np.flatnonzero(np.isin(tokens, its))) for adapter, its in self.adapted]
        return Wanted(
            tokens,
            cu_seqlens_q,
            self.logit_rows - shifts[chunks],
            tuple((adapter, its) for adapter, its in adapted if len(its)),
        )


class Wanted(NamedTuple):
    """The tokens of a batch that its logits depend on once the last layer's keys are written.

    Of each chunk these are its last tokens, from the first one whose logits are asked for.
    """

    tokens: np.ndarray  # (num_wanted,) int64: indices into the batch's tokens
    cu_seqlens_q: np.ndarray  # (num_seqs + 1,) int32, of these tokens
    logit_rows: np.ndarray  # (num_logits,) int32: indices into these tokens
    adapted: tuple[tuple[object, np.ndarray], ...]  # as in `Batch`, of these tokens
