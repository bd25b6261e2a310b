"""The integers a model step needs, laid out for the kernels."""

from collections.abc import Sequence as Collection
from dataclasses import dataclass

import numpy as np

from codellama_rt.engine.sequence import Chunk, int32_list

_PADDING = int32_list([-1])


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
        adapted: pairs of an adapter and the indices of its tokens, (count,) int64.
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


def build_batch(chunks: Collection[Chunk], block_size: int, *, rope_lengths: bool = False) -> Batch:
    """Lays out the scheduled chunks, in their order.

    Args:
        chunks: what to compute; their sequences have the blocks for it.
        block_size: tokens a block of the KV cache.
        rope_lengths: whether the model's RoPE depends on the length (dynamic scaling).

    Returns:
        A Batch; it shares no memory with the sequences.

    Example:
        >>> from codellama_rt.engine.sequence import Sequence
        >>> prompt = Sequence(int32_list([5, 6, 7]), 3, (0, 0, 0), first_logit=2)
        >>> prompt.block_ids.append(9)
        >>> build_batch([Chunk(prompt, 1, 3, 1)], block_size=4).slot_mapping
        array([37, 38], dtype=int32)
    """
    num_seqs = len(chunks)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    seq_lens = np.array([chunk.stop for chunk in chunks], np.int32)
    counts = seq_lens - starts
    cu_seqlens_q = np.zeros(num_seqs + 1, np.int32)
    counts.cumsum(out=cu_seqlens_q[1:])
    rows = np.arange(num_seqs).repeat(counts)  # (num_tokens,) -> its chunk
    positions = np.arange(len(rows), dtype=np.int32) + (starts - cu_seqlens_q[:-1])[rows]
    block_tables = _block_tables(chunks)
    block_index, offset = np.divmod(positions, np.int32(block_size))
    return Batch(
        token_ids=_token_ids(chunks),
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        block_tables=block_tables,
        slot_mapping=block_tables[rows, block_index] * np.int32(block_size) + offset,
        logit_rows=_logit_rows(chunks),
        rope_lengths=_rope_lengths(chunks, rows, positions) if rope_lengths else None,
        adapted=_adapted(chunks, rows),
    )


# An int32_list takes slices of another by memcpy, and NumPy views the result: no element becomes a
# Python object, and a table of 100k tokens costs a copy of 6 kB.
def _token_ids(chunks: Collection[Chunk]) -> np.ndarray:
    token_ids = int32_list()
    for chunk in chunks:
        token_ids.extend(chunk.sequence.token_ids[chunk.start : chunk.stop])
    return np.frombuffer(token_ids, np.int32)


def _block_tables(chunks: Collection[Chunk]) -> np.ndarray:
    width = max(len(chunk.sequence.block_ids) for chunk in chunks)
    table = int32_list()
    for chunk in chunks:
        block_ids = chunk.sequence.block_ids
        table.extend(block_ids)
        table.extend(_PADDING * (width - len(block_ids)))
    return np.frombuffer(table, np.int32).reshape(len(chunks), width)


def _logit_rows(chunks: Collection[Chunk]) -> np.ndarray:
    rows, end = int32_list(), 0
    for chunk in chunks:
        end += chunk.stop - chunk.start
        rows.extend(range(end - chunk.num_logits, end))
    return np.frombuffer(rows, np.int32)


def _rope_lengths(chunks: Collection[Chunk], rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Transformers' rule: a prompt's tokens see its whole length, later ones the length so far."""
    prompt_lens = np.array([chunk.sequence.prompt_len for chunk in chunks], np.int32)
    return np.maximum(prompt_lens[rows], positions + np.int32(1))


def _adapted(chunks: Collection[Chunk], rows: np.ndarray) -> tuple[tuple[object, np.ndarray], ...]:
    """The tokens of each adapter, those of all its chunks together."""
    users: dict[object, list[int]] = {}
    for i, chunk in enumerate(chunks):
        if chunk.sequence.adapter is not None:
            users.setdefault(chunk.sequence.adapter, []).append(i)
    return tuple((adapter, np.flatnonzero(np.isin(rows, its))) for adapter, its in users.items())
