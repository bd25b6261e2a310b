"""Caches and queries that are views: the bits of contiguous ones, what lies between untouched."""

import numpy as np
import pytest
from helpers.builders import int32
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import CACHE_DTYPES, Quantized, cache_row_bytes

BLOCKS, KV_HEADS, HEADS, BLOCK_SIZE, HEAD_DIM = 6, 2, 8, 32, 64
LENGTH, QUERIES = 75, 5
TABLE = int32([[3, 1, 4]])
SLOTS = int32([TABLE[0, i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(LENGTH)])
PAIRS = int32([[3, 0], [0, 5], [2, 2]])


def head_major(dtype):
    """Blocks of keys and of values in turn."""
    pool = np.full((BLOCKS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.nan, dtype)
    return pool, pool[:, 0], pool[:, 1]


def token_major(dtype):
    """NHD: (num_blocks, block_size, n_kv_heads, head_dim), keys and values apart."""
    pool = np.full((2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM), np.nan, dtype)
    return pool, pool[0].swapaxes(1, 2), pool[1].swapaxes(1, 2)


def token_major_side_by_side(dtype):
    """(num_blocks, 2, block_size, n_kv_heads, head_dim), as vLLM has them."""
    pool = np.full((BLOCKS, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM), np.nan, dtype)
    return pool, pool[:, 0].swapaxes(1, 2), pool[:, 1].swapaxes(1, 2)


def rows_side_by_side(dtype):
    """A token's key and value in one row, and heads before blocks."""
    pool = np.full((KV_HEADS, BLOCKS, BLOCK_SIZE, 2, HEAD_DIM), np.nan, dtype)
    views = pool.transpose(3, 1, 0, 2, 4)
    return pool, views[0], views[1]


def layers_of_one_pool(dtype):
    """The middle one of three layers that share each block."""
    pool = np.full((BLOCKS, 3, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.nan, dtype)
    return pool, pool[:, 1, 0], pool[:, 1, 1]


LAYOUTS = [head_major, token_major, token_major_side_by_side, rows_side_by_side, layers_of_one_pool]


def attend(query, caches):
    lens, ends = int32([LENGTH]), int32([0, QUERIES])
    return ops.paged_attention(query, *caches, TABLE, lens, ends)


def assert_same_caches(views, contiguous):
    for view, expected in zip(views, contiguous, strict=True):
        assert_equal_bits(np.ascontiguousarray(view), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("isa")
def test_views_of_a_pool(layout, dtype, rng):
    _, *views = layout(numpy_dtype(dtype))
    contiguous = [np.ascontiguousarray(view) for view in views]
    rows = rng.standard_normal((2, LENGTH, KV_HEADS, HEAD_DIM)).astype(numpy_dtype(dtype))
    query = rng.standard_normal((QUERIES, HEADS, HEAD_DIM)).astype(numpy_dtype(dtype))
    for caches in (views, contiguous):
        ops.reshape_and_cache(*rows, *caches, SLOTS)
    assert_same_caches(views, contiguous)
    for ours, theirs in zip(attend(query, views), attend(query, contiguous), strict=True):
        assert_equal_bits(ours, theirs)
    for caches in (views, contiguous):
        ops.copy_blocks(*caches, PAIRS)
    assert_same_caches(views, contiguous)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_and_cache_into_views_from_rows_that_lie_apart(layout, rng):
    _, *views = layout(np.float32)
    contiguous = [np.ascontiguousarray(view) for view in views]
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    wide = rng.standard_normal((LENGTH, width + 7), np.float32)
    angles = rng.standard_normal((LENGTH, HEAD_DIM // 2), np.float32)
    tables = np.cos(angles), np.sin(angles), np.arange(LENGTH, dtype=np.int32)
    ours = ops.rope_and_cache(wide[:, :width], *tables, *views, SLOTS)
    theirs = ops.rope_and_cache(wide[:, :width].copy(), *tables, *contiguous, SLOTS)
    assert_equal_bits(ours, theirs)
    assert_same_caches(views, contiguous)


def test_other_layers_of_the_pool_are_not_touched(rng):
    pool, *views = layers_of_one_pool(np.float32)
    rows = rng.standard_normal((2, LENGTH, KV_HEADS, HEAD_DIM), np.float32)
    ops.reshape_and_cache(*rows, *views, SLOTS)
    ops.copy_blocks(*views, PAIRS)
    assert np.isnan(pool[:, [0, 2]]).all()
    assert not np.isnan(views[0][3]).any()


# ---- quantised ---------------------------------------------------------------------------------


def quantized_views(dtype, make):
    """Views of one payload; int4 keys take more bytes than values."""
    sizes = [BLOCK_SIZE * row for row in cache_row_bytes(dtype, HEAD_DIM)]
    shape = (BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return [Quantized(payload, dtype, shape) for payload in make(*sizes)]


def heads_side_by_side(key_bytes, value_bytes):
    pool = np.zeros((BLOCKS, KV_HEADS, key_bytes + value_bytes), np.uint8)
    return pool[..., :key_bytes], pool[..., key_bytes:]


def heads_first(key_bytes, value_bytes):
    pool = np.zeros((KV_HEADS, BLOCKS, key_bytes + value_bytes + 3), np.uint8).swapaxes(0, 1)
    return pool[..., :key_bytes], pool[..., key_bytes + 3 :]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("make", [heads_side_by_side, heads_first])
@pytest.mark.usefixtures("isa")
def test_views_of_a_quantised_pool(make, dtype, rng):
    views = quantized_views(dtype, make)
    contiguous = ops.empty_caches(dtype, views[0].shape)
    rows = rng.standard_normal((2, LENGTH, KV_HEADS, HEAD_DIM), np.float32)
    query = rng.standard_normal((QUERIES, HEADS, HEAD_DIM), np.float32)
    for caches in (views, contiguous):
        ops.reshape_and_cache(*rows, *caches, SLOTS)
        ops.copy_blocks(*caches, PAIRS)
    for ours, theirs in zip(attend(query, views), attend(query, contiguous), strict=True):
        assert_equal_bits(ours, theirs)
    for view, expected in zip(views, contiguous, strict=True):
        assert_equal_bits(np.ascontiguousarray(view.payload), expected.payload)


def test_a_quantised_cache_has_no_gaps_between_tokens():
    pool = np.zeros((BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM + 4), np.uint8)
    cache = Quantized(pool.swapaxes(1, 2), "int8", (BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM))
    with pytest.raises(ValueError, match="gaps between blocks and between heads, not between toke"):
        ops.copy_blocks(cache, cache, PAIRS)


def test_quantised_pieces_do_not_overlap():
    memory = np.zeros(10**6, np.uint8)
    piece = BLOCK_SIZE * (HEAD_DIM + 4)
    payload = np.lib.stride_tricks.as_strided(
        memory, (BLOCKS, KV_HEADS, piece), (piece, piece, 1), writeable=True
    )
    cache = Quantized(payload, "int8", (BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM))
    with pytest.raises(ValueError, match="copy_blocks: key_cache: blocks or heads overlap"):
        ops.copy_blocks(cache, cache, PAIRS)


def test_a_weight_has_no_gaps():
    quantized = ops.quantize(np.ones((16, 64), np.float32), "int8")
    payload = np.zeros((quantized.nbytes, 2), np.uint8)[:, 0]
    with pytest.raises(ValueError, match="payload of a Quantized must be contiguous"):
        ops.linear(np.ones((1, 64), np.float32), Quantized(payload, "int8", quantized.shape))


# ---- what is refused ---------------------------------------------------------------------------


def test_rows_of_a_cache_are_contiguous_and_do_not_overlap():
    shape = (BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    good = np.zeros(shape, np.float32)
    reversed_blocks = good[::-1]
    wide = np.zeros((*shape[:-1], 2 * HEAD_DIM), np.float32)[..., ::2]
    overlapping = np.lib.stride_tricks.as_strided(good, shape, (256, 256, 256, 4), writeable=True)
    raw = np.zeros(good.nbytes + 64 * BLOCKS, np.uint8)
    odd = np.ndarray(shape, np.float32, raw, strides=(good.strides[0] + 2, *good.strides[1:]))
    for cache in (reversed_blocks, wide, overlapping, odd):
        with pytest.raises(
            ValueError, match=r"value_cache .* contiguous within its rows, which must"
        ):
            ops.copy_blocks(good, cache, PAIRS)


def test_keys_and_values_have_one_stride_of_tokens():
    good = np.zeros((BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float32)
    view = token_major(np.float32)[1]
    query = np.ones((QUERIES, HEADS, HEAD_DIM), np.float32)
    with pytest.raises(
        ValueError, match="same stride from token to token, got 64 and 128 elements"
    ):
        attend(query, (good, view))


# ---- views of a fused qkv ----------------------------------------------------------------------


def split(qkv):
    """Query, key and value as views."""
    ends = np.cumsum([HEADS, KV_HEADS]) * HEAD_DIM
    return [
        part.reshape(len(qkv), -1, HEAD_DIM)
        for part in (qkv[:, : ends[0]], qkv[:, ends[0] : ends[1]], qkv[:, ends[1] :])
    ]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_views_of_a_fused_qkv(dtype, rng):
    qkv = rng.standard_normal((LENGTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
    views = split(qkv.astype(numpy_dtype(dtype)))
    assert all(np.shares_memory(view, views[0].base) for view in views)
    copies = [view.copy() for view in views]
    angles = rng.standard_normal((LENGTH, HEAD_DIM // 2), np.float32)
    tables = np.cos(angles), np.sin(angles), np.arange(LENGTH, dtype=np.int32)
    ends, results = int32([0, 40, LENGTH]), []
    for query, key, value in (views, copies):
        ops.apply_rotary_pos_emb(query, key, *tables)
        caches = ops.empty_caches(dtype, (BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM))
        ops.reshape_and_cache(key, value, *caches, SLOTS)
        results.append(
            [
                *(np.ascontiguousarray(part) for part in (query, key, value)),
                *caches,
                *ops.flash_attention(query, key, value, ends, ends),
                *attend(query[-QUERIES:], caches),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        assert_equal_bits(ours, theirs)
