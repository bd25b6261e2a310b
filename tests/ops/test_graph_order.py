"""Writes in place inside compiled graphs: each is done, and before and after what depends on it."""

import numpy as np
import pytest
from helpers.builders import ends, int32, normal, rope_tables
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
depend, tensor = mindspore.ops.depend, mindspore.Tensor.from_numpy
graph = ops.graph
STEPS, REPEATS, HEAD_DIM = 16, 20, 8
TABLE, CU = int32([[1, 0]]), ends([1])


def empty_caches():
    return np.full((2, 2, 1, 16, HEAD_DIM), np.nan, np.float32)


def slots_and_lengths():
    """Step i writes the key of position i, which lies in block 1, and reads i + 1 keys."""
    return int32(16 + np.arange(STEPS))[:, None], int32(1 + np.arange(STEPS))[:, None]


def run_repeatedly(compiled, direct, *arrays):
    """Run direct calls and graph ops from empty caches several times: unfixed orders may change."""
    slots, lengths = slots_and_lengths()
    expected_caches = empty_caches()
    expected = direct(*arrays, *expected_caches, slots, lengths)
    tensors = [tensor(array) for array in arrays]
    per_step = [tuple(tensor(row) for row in rows) for rows in (slots, lengths)]
    for _ in range(REPEATS):
        caches = empty_caches()
        made = compiled(*tensors, *map(tensor, caches), *per_step, tensor(TABLE), tensor(CU))
        for ours, theirs in zip(made, expected, strict=True):
            assert_equal_bits(ours.asnumpy(), theirs)
        assert_equal_bits(caches, expected_caches)


def test_writes_and_reads_in_turn_by_tokens(rng):
    """reshape_and_cache and paged_attention 16 times over the same block."""
    query, key, value = normal(rng, (3, 1, 1, HEAD_DIM))

    @mindspore.jit
    def compiled(query, key, value, key_cache, value_cache, slots, lengths, table, cu):
        outs = ()
        for i in range(STEPS):
            token = graph.reshape_and_cache(key, value, key_cache, value_cache, slots[i])
            key_cache = depend(key_cache, token)
            value_cache = depend(value_cache, token)
            out, _ = graph.paged_attention(query, key_cache, value_cache, table, lengths[i], cu)
            outs = (*outs, out)
            key, value = out, key + out
            key_cache = depend(key_cache, out)  # the next write comes after this read
            value_cache = depend(value_cache, out)
        return outs

    def direct(query, key, value, key_cache, value_cache, slots, lengths):
        outs = []
        for i in range(STEPS):
            ops.reshape_and_cache(key, value, key_cache, value_cache, slots[i])
            outs.append(
                ops.paged_attention(query, key_cache, value_cache, TABLE, lengths[i], CU)[0]
            )
            key, value = outs[-1], key + outs[-1]
        return outs

    run_repeatedly(compiled, direct, query, key, value)


def test_the_rotated_query_orders_writes_and_reads(rng):
    """rope_and_cache and paged_attention 16 times, with nothing but the query between them."""
    qkv, (cos, sin) = normal(rng, (1, 3 * HEAD_DIM)), rope_tables(STEPS, HEAD_DIM)
    zero = int32([0])

    @mindspore.jit
    def compiled(qkv, cos, sin, zero, key_cache, value_cache, slots, lengths, table, cu):
        outs = ()
        for i in range(STEPS):
            query = graph.rope_and_cache(qkv, cos, sin, zero, key_cache, value_cache, slots[i])
            out, _ = graph.paged_attention(query, key_cache, value_cache, table, lengths[i], cu)
            outs = (*outs, out)
            qkv = qkv + out.reshape(1, -1).tile((1, 3))  # the next write comes after this read
        return outs

    def direct(qkv, cos, sin, zero, key_cache, value_cache, slots, lengths):
        outs = []
        for i in range(STEPS):
            query = ops.rope_and_cache(qkv, cos, sin, zero, key_cache, value_cache, slots[i])
            outs.append(
                ops.paged_attention(query, key_cache, value_cache, TABLE, lengths[i], CU)[0]
            )
            qkv = qkv + np.tile(outs[-1].reshape(1, -1), (1, 3))
        return outs

    run_repeatedly(compiled, direct, qkv, cos, sin, zero)


def test_copied_blocks_are_read_after_the_copy(rng):
    query, cache = normal(rng, (1, 1, HEAD_DIM)), normal(rng, (3, 1, 16, HEAD_DIM))
    pairs, lengths, table = int32([[0, 1], [1, 2]]), int32([16]), int32([[2]])

    @mindspore.jit
    def compiled(query, key_cache, value_cache, pairs):
        token = graph.copy_blocks(key_cache, value_cache, pairs)
        caches = depend(key_cache, token), depend(value_cache, token)
        return graph.paged_attention(query, *caches, tensor_table, tensor_lengths, tensor_cu)

    tensor_table, tensor_lengths, tensor_cu = tensor(table), tensor(lengths), tensor(CU)
    expected, _ = ops.paged_attention(query, cache, cache, int32([[0]]), lengths, CU)
    for _ in range(REPEATS):
        copies = cache.copy(), cache.copy()
        out, _ = compiled(tensor(query), *map(tensor, copies), tensor(pairs))
        assert_equal_bits(out.asnumpy(), expected)
        assert_equal_bits(copies[0][2], cache[0])


def test_rotation_in_place_is_read_after_it(rng):
    query, key = normal(rng, (2, 3, 2, HEAD_DIM))
    tables, positions, cu = rope_tables(9, HEAD_DIM), int32([0, 7, 8]), ends([3])

    @mindspore.jit
    def compiled(query, key, value, cos, sin, positions, cu):
        token = graph.apply_rotary_pos_emb(query, key, cos, sin, positions)
        query, key = depend(query, token), depend(key, token)
        return graph.flash_attention(query, key, value, cu, cu)[0]

    turned = query.copy(), key.copy()
    ops.apply_rotary_pos_emb(*turned, *tables, positions)
    expected, _ = ops.flash_attention(*turned, key, cu, cu)
    for _ in range(REPEATS):
        given = query.copy(), key.copy()
        arguments = [tensor(a) for a in (*given, key, *tables, positions, cu)]
        assert_equal_bits(compiled(*arguments).asnumpy(), expected)
        assert_equal_bits(given[0], turned[0])


def test_pynative_runs_in_the_order_of_the_calls(rng):
    """No token is needed there."""
    query, key, value = normal(rng, (3, 1, 1, HEAD_DIM))
    slots, lengths = slots_and_lengths()
    caches, expected_caches = empty_caches(), empty_caches()
    pages = [tensor(cache) for cache in caches]
    table, cu = tensor(TABLE), tensor(CU)
    for slot, length in zip(slots, lengths, strict=True):
        graph.reshape_and_cache(tensor(key), tensor(value), *pages, tensor(slot))
        out, _ = graph.paged_attention(tensor(query), *pages, table, tensor(length), cu)
        ops.reshape_and_cache(key, value, *expected_caches, slot)
        key, _ = ops.paged_attention(query, *expected_caches, TABLE, length, CU)
        assert_equal_bits(out.asnumpy(), key)
    assert_equal_bits(caches, expected_caches)
