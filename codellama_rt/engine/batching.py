"""From scheduled chunks to the batch of a model step."""

from collections.abc import Sequence as Collection

import numpy as np

from codellama_rt.engine.sequence import Chunk, int32_list
from codellama_rt.model.batch import Batch
from codellama_rt.model.lora import LoraAdapter

_PADDING = int32_list([-1])


def build_batch(chunks: Collection[Chunk], block_size: int, *, rope_lengths: bool = False) -> Batch:
    """Lay out the scheduled chunks, in their order.

    Args:
        chunks: what to compute; their sequences have the necessary blocks.
        block_size: tokens per block of the KV cache.
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
    tables = block_tables(chunks)
    block_index, offset = np.divmod(positions, np.int32(block_size))
    return Batch(
        token_ids=_token_ids(chunks),
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        block_tables=tables,
        slot_mapping=tables[rows, block_index] * np.int32(block_size) + offset,
        logit_rows=_logit_rows(chunks),
        rope_lengths=_rope_lengths(chunks, rows, positions) if rope_lengths else None,
        adapted=_adapted(chunks, rows),
    )


# An int32_list extends itself by memcpy from slices of another, and NumPy views the result: no
# element becomes a Python object, and the block table of 100k tokens costs a copy of 6 kB.
def _token_ids(chunks: Collection[Chunk]) -> np.ndarray:
    token_ids = int32_list()
    for chunk in chunks:
        if chunk.stop == chunk.start + 1:
            token_ids.append(chunk.sequence.token_ids[chunk.start])
        else:
            token_ids.extend(chunk.sequence.token_ids[chunk.start : chunk.stop])
            token_ids.extend(chunk.draft)
    return np.frombuffer(token_ids, np.int32)


def block_tables(chunks: Collection[Chunk]) -> np.ndarray:
    """Return the blocks of each chunk's sequence, (num_seqs, max_blocks) int32; padding is -1."""
    tables = [chunk.sequence.block_ids for chunk in chunks]
    width = max(map(len, tables))
    table = int32_list()
    for block_ids in tables:
        table.extend(block_ids)
        if len(block_ids) < width:
            table.extend(_PADDING * (width - len(block_ids)))
    return np.frombuffer(table, np.int32).reshape(len(chunks), width)


def _logit_rows(chunks: Collection[Chunk]) -> np.ndarray:
    rows, end = int32_list(), 0
    for chunk in chunks:
        end += chunk.stop - chunk.start
        if chunk.num_logits == 1:
            rows.append(end - 1)
        else:
            rows.extend(range(end - chunk.num_logits, end))
    return np.frombuffer(rows, np.int32)


def _rope_lengths(chunks: Collection[Chunk], rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return each token's length for RoPE: a prompt's whole length, later the length so far.

    This is the rule of Transformers.
    """
    prompt_lens = np.array([chunk.sequence.prompt_len for chunk in chunks], np.int32)
    return np.maximum(prompt_lens[rows], positions + np.int32(1))


def _adapted(
    chunks: Collection[Chunk], rows: np.ndarray
) -> tuple[tuple[LoraAdapter, np.ndarray], ...]:
    """Return the tokens of each adapter, over all its chunks."""
    users: dict[LoraAdapter, list[int]] = {}
    for i, chunk in enumerate(chunks):
        if chunk.sequence.adapter is not None:
            users.setdefault(chunk.sequence.adapter, []).append(i)
    return tuple((adapter, np.flatnonzero(np.isin(rows, its))) for adapter, its in users.items())
