"""rope_and_cache: the bits of the two ops it fuses, and the oracle's numbers."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, int32, normal, quantized_caches, rope_tables
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import CACHE_DTYPES

pytestmark = pytest.mark.usefixtures("isa")
HEADS = pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True])
NUM_TOKENS = 19


def make(rng, heads, head_dim, dtype):
    """qkv, tables, positions and slots of 19 tokens for 3 blocks of 16."""
    n_heads, n_kv_heads = heads
    qkv = normal(rng, (NUM_TOKENS, (n_heads + 2 * n_kv_heads) * head_dim), dtype)
    slots = int32(rng.permutation(48)[:NUM_TOKENS])
    slots[3] = -1
    return qkv, rope_tables(90, head_dim), int32(rng.integers(0, 90, NUM_TOKENS)), slots


@PAIRINGS
@HEADS
@pytest.mark.parametrize("head_dim", [2, 30, 128])
@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_STORED)
def test_against_the_oracle(rng, guarded, dtype, cache_dtype, head_dim, heads, interleaved):
    qkv, tables, positions, slots = make(rng, heads, head_dim, dtype)
    caches = [guarded((3, heads[1], 16, head_dim), cache_dtype) for _ in range(2)]
    for cache in caches:
        cache[...] = np.nan
    expected_caches = [cache.copy() for cache in caches]
    out = guarded((NUM_TOKENS, heads[0], head_dim), dtype)
    returned = ops.rope_and_cache(
        qkv, *tables, positions, *caches, slots, interleaved=interleaved, out=out
    )
    expected = reference.rope_and_cache(
        qkv, *tables, positions, *expected_caches, slots, interleaved=interleaved
    )
    assert returned is out
    assert_rounded(out, expected)
    assert_rounded(caches[0], expected_caches[0])
    assert_equal_bits(caches[1], expected_caches[1])


@PAIRINGS
@HEADS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_the_two_ops(rng, dtype, heads, interleaved):
    """In one dtype throughout; across two the fused op rounds once where the others round twice."""
    qkv, tables, positions, slots = make(rng, heads, 64, dtype)
    n_heads, n_kv_heads = heads
    split = qkv.reshape(NUM_TOKENS, -1, 64)
    query, key, value = (
        part.copy() for part in np.split(split, [n_heads, n_heads + n_kv_heads], axis=1)
    )
    fused, apart = np.zeros((2, 2, 3, n_kv_heads, 16, 64), qkv.dtype)
    out = ops.rope_and_cache(qkv, *tables, positions, *fused, slots, interleaved=interleaved)
    ops.apply_rotary_pos_emb(query, key, *tables, positions, interleaved=interleaved)
    ops.reshape_and_cache(key, value, *apart, slots)
    assert_equal_bits(out, query)
    assert_equal_bits(fused, apart)


@PAIRINGS
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_quantized_as_written_by_the_two_ops(rng, guarded, cache_dtype, dtype, heads, interleaved):
    """The rotated key is quantised from float32: in one 16-bit dtype the two ops round it first."""
    qkv, tables, positions, slots = make(rng, heads, 64, dtype)
    n_heads, n_kv_heads = heads
    fused, apart = (
        quantized_caches(cache_dtype, (3, n_kv_heads, 16, 64), guarded) for _ in range(2)
    )
    out = ops.rope_and_cache(qkv, *tables, positions, *fused, slots, interleaved=interleaved)
    exact = qkv.astype(np.float32).reshape(NUM_TOKENS, -1, 64)
    query, key, value = (
        part.copy() for part in np.split(exact, [n_heads, n_heads + n_kv_heads], axis=1)
    )
    ops.apply_rotary_pos_emb(query, key, *tables, positions, interleaved=interleaved)
    ops.reshape_and_cache(key, value, *apart, slots)
    assert_equal_bits(out, query.astype(out.dtype))
    for ours, theirs in zip(fused, apart, strict=True):
        assert_equal_bits(ours.payload, theirs.payload)


def test_position_100_000(rng):
    qkv = normal(rng, (2, 4 * 64))
    tables, positions = rope_tables(100_001, 64), int32([100_000, 65_536])
    caches, expected = np.zeros((2, 2, 1, 1, 16, 64), np.float32)
    ops.rope_and_cache(qkv, *tables, positions, *caches, int32([7, 2]))
    reference.rope_and_cache(qkv, *tables, positions, *expected, int32([7, 2]))
    assert_rounded(caches, expected)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("positions", r"positions\[1\] must be in \[0, num_positions=90\), got 90"),
        ("slots", r"slot_mapping\[1\] must be in \[-1, num_blocks \* block_size=16\), got 90"),
    ],
)
def test_values_out_of_range(rng, argument, message):
    values = {"positions": int32([0, 1]), "slots": int32([0, 1])}
    values[argument][1] = 90
    caches = np.zeros((2, 1, 1, 16, 8), np.float32)
    with pytest.raises(ValueError, match=f"rope_and_cache: {message}"):
        ops.rope_and_cache(
            normal(rng, (2, 3 * 8)), *rope_tables(90, 8), values["positions"], *caches,
            values["slots"],
        )  # fmt: skip
    assert not caches.any()
