"""Decoding over chosen blocks of the KV cache: query-aware sparse attention.

A generated token attends the first block of its sequence, the last two, and those of the others
that may hold the largest scores. With the least key l and the greatest key u of a block, dimension
by dimension, no key of the block has a score with the query q above

    sum over d of max(q[d] l[d], q[d] u[d])

(Quest, arXiv:2406.10774). Each KV head chooses for itself, by the largest bound of its query heads.
Prompts are attended exactly, and so are the first two layers, where attention is spread widely.

What a token attends depends on its own sequence and its position alone, never on the batch, the
chunk or the places of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from codellama_rt import ops
from codellama_rt.model.batch import Batch
from codellama_rt.model.key_bounds import KeyBounds
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.ops.quantized import Quantized

DENSE_LAYERS = 2
_RECENT_BLOCKS = 2
_LEAST_TOKENS = 1024  # are always attended
_ROWS_AT_ONCE = 16  # whose scores of all blocks are in memory


@dataclass(slots=True)
class _Row:
    """A token that attends chosen blocks.

    Attributes:
        index: of the token in the batch.
        table: the blocks of its sequence that hold keys up to it, (total,) int32.
        count: how many of them it attends.
        num_last: tokens of the last one that it attends.
    """

    index: int
    table: np.ndarray
    count: int
    num_last: int


class SparseAttention:
    """The attention of one step, in place of `ops.paged_attention`."""

    def __init__(self, rows: list[_Row], dense: _Dense, bounds: KeyBounds) -> None:
        """Attend chosen blocks with some tokens of a batch, and everything with the others."""
        self._rows, self._dense, self._bounds = rows, dense, bounds
        chosen_from = [row.table[1:-_RECENT_BLOCKS] for row in rows]
        self._block_ids = np.unique(np.concatenate(chosen_from))
        self._first, self._stop = self._block_ids[0], self._block_ids[-1] + 1

    @classmethod
    def of(cls, batch: Batch, kv_cache: KVCache) -> SparseAttention | None:
        """Return the attention of a step; None: every token attends everything."""
        sparse, size = batch.sparse, kv_cache.block_size
        counts = np.diff(batch.cu_seqlens_q)
        chunks = np.arange(len(counts)).repeat(counts)
        totals = batch.positions // size + 1
        least = max(-(-_LEAST_TOKENS // size), _RECENT_BLOCKS + 2)
        num_chosen = np.maximum(least, np.ceil(totals * sparse.fraction).astype(np.int64))
        is_sparse = (batch.positions >= sparse.prompt_lens[chunks]) & (num_chosen < totals)
        if not is_sparse.any():
            return None
        rows = [
            _Row(
                i,
                batch.block_tables[chunks[i], : totals[i]],
                int(num_chosen[i]),
                int(batch.positions[i]) % size + 1,
            )
            for i in np.flatnonzero(is_sparse).tolist()
        ]
        num_sparse = np.bincount(chunks[is_sparse], minlength=len(counts))
        return cls(rows, _Dense.of(batch, ~is_sparse, num_sparse), kv_cache.key_bounds())

    def __call__(
        self,
        layer: int,
        query: np.ndarray,
        key_cache: Any,
        value_cache: Any,
        sequences: tuple[np.ndarray, np.ndarray, np.ndarray],
        out: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Attend as `ops.paged_attention` does, with the same arguments after the layer's index."""
        if layer < DENSE_LAYERS:
            ops.paged_attention(query, key_cache, value_cache, *sequences, out=out)
            return
        self._dense.attend(query, key_cache, value_cache, out)
        bounds = self._bounds.of_layer(layer, key_cache, self._block_ids)
        caches = _one_head_each(key_cache), _one_head_each(value_cache)
        for start in range(0, len(self._rows), _ROWS_AT_ONCE):
            self._attend(self._rows[start : start + _ROWS_AT_ONCE], query, bounds, caches, out)

    def _attend(
        self,
        rows: list[_Row],
        query: np.ndarray,
        bounds: np.ndarray,
        caches: tuple[Any, Any],
        out: tuple[np.ndarray, np.ndarray],
    ) -> None:
        n_kv_heads, indices = len(bounds), [row.index for row in rows]
        some = query[indices]  # (rows, n_heads, head_dim)
        best = self._largest_scores(some, bounds)
        width = max(row.count for row in rows)
        tables = np.full((len(rows), n_kv_heads, width), -1, np.int32)
        lengths = np.empty((len(rows), n_kv_heads), np.int32)
        block_size = caches[0].shape[2]
        for row, scores, table, length in zip(
            rows, best.swapaxes(0, 1), tables, lengths, strict=True
        ):
            chosen = row.table[_choose(scores, row.table - self._first, row.count)]
            # A block of one head is a block of its own in `caches`.
            table[:, : row.count] = chosen * n_kv_heads + np.arange(n_kv_heads)[:, None]
            length[:] = (row.count - 1) * block_size + row.num_last
        per_head = some.reshape(len(rows) * n_kv_heads, -1, some.shape[2])
        attended, lse = ops.paged_attention(
            per_head,
            *caches,
            tables.reshape(len(per_head), width),
            lengths.reshape(-1),
            np.arange(len(per_head) + 1, dtype=np.int32),
        )
        out[0][indices] = attended.reshape(some.shape)
        out[1][indices] = lse.reshape(some.shape[:2])

    def _largest_scores(self, query: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Return what no score of a block is above, (n_kv_heads, rows, blocks) float32.

        The blocks are those from the first to the last that some row chooses from.
        """
        num_rows, n_kv_heads, head_dim = len(query), len(bounds), query.shape[2]
        by_head = query.reshape(num_rows, n_kv_heads, -1, head_dim).swapaxes(0, 1)
        parts = np.concatenate([np.minimum(by_head, 0), np.maximum(by_head, 0)], axis=-1)
        scores = [
            ops.linear(part.reshape(-1, 2 * head_dim), its[self._first : self._stop])
            for part, its in zip(parts, bounds, strict=True)
        ]
        return np.stack([one.reshape(num_rows, -1, one.shape[1]).max(1) for one in scores])


class _Dense:
    """The tokens of a batch that attend everything: of each chunk the first ones, or none."""

    def __init__(self, tokens: np.ndarray, sequences: tuple[np.ndarray, ...]) -> None:
        self._tokens, self._sequences = tokens, sequences

    @classmethod
    def of(cls, batch: Batch, is_dense: np.ndarray, num_sparse: np.ndarray) -> _Dense:
        ends = np.concatenate([[0], np.cumsum(np.diff(batch.cu_seqlens_q) - num_sparse)])
        lengths = batch.seq_lens - num_sparse.astype(np.int32)
        sequences = batch.block_tables, lengths, ends.astype(np.int32)
        return cls(np.flatnonzero(is_dense), sequences)

    def attend(
        self,
        query: np.ndarray,
        key_cache: Any,
        value_cache: Any,
        out: tuple[np.ndarray, np.ndarray],
    ) -> None:
        if len(self._tokens):
            attended, lse = ops.paged_attention(
                query[self._tokens], key_cache, value_cache, *self._sequences
            )
            out[0][self._tokens], out[1][self._tokens] = attended, lse


def _choose(scores: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
    """Return which blocks of a sequence each head attends, in their order.

    Args:
        scores: (n_kv_heads, blocks) float32: how good a block may be.
        columns: (total,) where the sequence's blocks are in `scores`.
        count: how many each head attends.

    Returns:
        (n_kv_heads, count) int64, indices into `columns`.
    """
    last = len(columns) - _RECENT_BLOCKS
    others = scores[:, columns[1:last]]
    num_free = count - 1 - _RECENT_BLOCKS
    best = np.argpartition(-others, num_free - 1, axis=1)[:, :num_free] + 1
    always = np.broadcast_to([0, *range(last, len(columns))], (len(scores), count - num_free))
    return np.sort(np.concatenate([best, always], axis=1), axis=1)


def _one_head_each(cache: Any) -> Any:
    """View (num_blocks, n_kv_heads, ...) as blocks of a single head."""
    num_blocks, n_kv_heads, *block = cache.shape
    shape = (num_blocks * n_kv_heads, 1, *block)
    if isinstance(cache, Quantized):
        return Quantized(cache.payload.reshape(*shape[:2], -1), cache.dtype, shape)
    return cache.reshape(shape)
