"""The arrays of a batch, against loops that say the same one token at a time."""

import numpy as np
import pytest

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list


def placed(tokens, blocks, prompt_len=None):
    tokens = int32_list(tokens)
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    sequence = Sequence(tokens, prompt_len, (0, 0, 0), len(tokens) - 1)
    sequence.block_ids.extend(blocks)
    return sequence


def test_a_decode_and_a_chunk():
    decoding = placed([1, 2, 3, 4, 5], [7, 3])
    prefilling = placed([10, 11, 12, 13, 14, 15], [0, 5])
    batch = build_batch([Chunk(decoding, 4, 5, 1), Chunk(prefilling, 2, 5, 0)], block_size=4)
    assert batch.token_ids.tolist() == [5, 12, 13, 14]
    assert batch.positions.tolist() == [4, 2, 3, 4]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.seq_lens.tolist() == [5, 5]
    assert batch.block_tables.tolist() == [[7, 3], [0, 5]]
    assert batch.slot_mapping.tolist() == [12, 2, 3, 20]
    assert batch.logit_rows.tolist() == [0]
    assert batch.rope_lengths is None


def test_short_tables_are_padded_and_no_logits_may_be_wanted():
    chunks = [Chunk(placed(range(9), [4, 2, 1]), 0, 9, 0), Chunk(placed(range(2), [8]), 0, 1, 0)]
    batch = build_batch(chunks, block_size=4)
    assert batch.block_tables.tolist() == [[4, 2, 1], [8, -1, -1]]
    assert batch.logit_rows.shape == (0,)


def test_rope_lengths_are_the_prompt_s_then_the_length_so_far():
    sequence = placed(range(6), [0, 1], prompt_len=4)
    batch = build_batch([Chunk(sequence, 1, 6, 1)], block_size=4, rope_lengths=True)
    assert batch.rope_lengths.tolist() == [4, 4, 4, 5, 6]
    assert batch.rope_lengths.dtype == np.int32


@pytest.mark.parametrize("seed", range(20))
def test_random_chunks_equal_the_loops(seed):
    rng = np.random.default_rng(seed)
    block_size, pool = int(rng.integers(1, 9)), rng.permutation(1000)
    chunks = []
    for _ in range(rng.integers(1, 20)):
        length = int(rng.integers(1, 60))
        num_blocks = -(-length // block_size)
        blocks, pool = pool[:num_blocks], pool[num_blocks:]
        start = int(rng.integers(0, length))
        stop = int(rng.integers(start + 1, length + 1))
        num_logits = int(rng.integers(0, stop - start + 1))
        tokens = rng.integers(0, 100, length)
        chunks.append(Chunk(placed(tokens.tolist(), blocks.tolist()), start, stop, num_logits))
    batch = build_batch(chunks, block_size)
    tokens, positions, slots, wanted = [], [], [], []
    for chunk in chunks:
        for position in range(chunk.start, chunk.stop):
            if chunk.stop - position <= chunk.num_logits:
                wanted.append(len(tokens))
            tokens.append(chunk.sequence.token_ids[position])
            positions.append(position)
            block_id = chunk.sequence.block_ids[position // block_size]
            slots.append(block_id * block_size + position % block_size)
    assert batch.token_ids.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slot_mapping.tolist() == slots
    assert batch.logit_rows.tolist() == wanted
    assert batch.adapted == ()
    for name in set(type(batch).__slots__) - {"adapted"}:
        array = getattr(batch, name)
        assert array is None or (array.dtype == np.int32 and array.flags.c_contiguous)


def test_the_batch_keeps_its_values_when_sequences_grow():
    sequence = placed([1, 2], [3])
    batch = build_batch([Chunk(sequence, 0, 2, 1)], block_size=2)
    sequence.token_ids.append(9)
    sequence.block_ids.append(4)
    assert batch.token_ids.tolist() == [1, 2]
    assert batch.block_tables.tolist() == [[3]]


def test_the_tokens_of_each_adapter_stand_together():
    sequences = [placed([1, 2, 3], [i]) for i in range(4)]
    first, second = object(), object()
    for sequence, adapter in zip(sequences, (first, None, second, first), strict=True):
        sequence.adapter = adapter
    batch = build_batch([Chunk(sequence, 0, 3, 1) for sequence in sequences], block_size=4)
    found = {adapter: rows.tolist() for adapter, rows in batch.adapted}
    assert found == {first: [0, 1, 2, 9, 10, 11], second: [6, 7, 8]}
