"""Quantised caches: what their numbers stand for, how near it is, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.builders import int32, normal, paged, unwritten_caches
from helpers.huge_pages import advised_huge_pages
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import (
    CACHE_DTYPES,
    cache_row_bytes,
    empty_caches,
    read_cache,
    rotate_rows,
)  # fmt: skip

DTYPES = pytest.mark.parametrize("dtype", CACHE_DTYPES)
# Half a step of the quantiser, as a share of a row's range: of 2 max|x|, or of max - min.
STEPS = {("int8", True): 254, ("int8", False): 254, ("int4", True): 31, ("int4", False): 15}
SCALE_ROUNDING = 2**-11  # of float16 scales and minimums


def written(rng, dtype, head_dim=64, **changes):
    """Keys, values (32, 2, head_dim) and the caches that hold them in order."""
    key, value = (normal(rng, (32, 2, head_dim)) for _ in range(2))
    for (row, column), number in changes.get("elements", {}).items():
        key[row, 0, column] = value[row, 0, column] = number
    caches = empty_caches(dtype, (2, 2, 16, head_dim))
    ops.reshape_and_cache(key, value, *caches, int32(np.arange(32)))
    return key, value, caches


def rows_of(cache, *, key):
    """(num_tokens, n_kv_heads, head_dim) of blocks in order."""
    numbers = read_cache(cache, key=key)
    return numbers.swapaxes(1, 2).reshape(-1, numbers.shape[1], numbers.shape[3])


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_numbers_are_within_half_a_step(rng, dtype, head_dim):
    *written_rows, caches = written(rng, dtype, head_dim)
    for rows, cache, key in zip(written_rows, caches, (True, False), strict=True):
        found = rows_of(cache, key=key)
        if dtype == "int4" and key:
            rows, found = (rotate_rows(x, for_query=False) for x in (rows, found))
        spread = 2 * np.abs(rows).max(-1) if dtype == "int8" else np.ptp(rows, axis=-1)
        bound = spread * (0.5 / STEPS[dtype, key] + SCALE_ROUNDING)
        assert (np.abs(found - rows).max(-1) <= bound).all()


@DTYPES
@pytest.mark.usefixtures("isa")
def test_rows_without_range(rng, dtype):
    """Zeros, one number throughout, and numbers too small for a scale are no division by zero."""
    rows = np.zeros((4, 1, 32), np.float32)
    rows[1], rows[2], rows[3] = 2.5, 1e-38, -1e-7
    caches, expected = empty_caches(dtype, (1, 1, 16, 32)), empty_caches(dtype, (1, 1, 16, 32))
    ops.reshape_and_cache(rows, rows, *caches, int32([3, 2, 1, 0]))
    reference.reshape_and_cache(rows, rows, *expected, int32([3, 2, 1, 0]))
    for cache, wanted, key in zip(caches, expected, (True, False), strict=True):
        assert_equal_bits(cache.payload, wanted.payload)
        np.testing.assert_allclose(rows_of(cache, key=key)[3::-1], rows, rtol=1e-3, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("isa")
def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not(rng, dtype, bad):
    *_, caches = written(rng, dtype, elements={(5, 7): bad})
    for cache, key in zip(caches, (True, False), strict=True):
        numbers = rows_of(cache, key=key)
        assert np.isnan(numbers[5, 0]).all()
        numbers[5, 0] = 0
        assert np.isfinite(numbers).all()


@pytest.mark.usefixtures("isa")
def test_int4_past_the_range_of_its_scales_is_nan(rng):
    *_, (_, value_cache) = written(rng, "int4", elements={(5, 7): -1e5})
    assert np.isnan(rows_of(value_cache, key=False)[5, 0]).all()


@DTYPES
@pytest.mark.usefixtures("isa")
def test_a_row_depends_on_its_own_token_alone(rng, dtype):
    key, value, caches = written(rng, dtype)
    one_by_one = empty_caches(dtype, caches[0].shape)
    for token in rng.permutation(32):
        here = slice(token, token + 1)
        ops.reshape_and_cache(key[here], value[here], *one_by_one, int32([token]))
    for ours, theirs in zip(one_by_one, caches, strict=True):
        assert_equal_bits(ours.payload, theirs.payload)


@pytest.mark.parametrize("n", [2, 30, 80, 96, 128])
def test_rotations_undo_each_other(rng, n):
    x = rng.standard_normal((3, n))
    there = rotate_rows(x, for_query=False)
    np.testing.assert_allclose(rotate_rows(there, for_query=True), x, rtol=1e-12, atol=1e-12)
    query = rng.standard_normal((3, n))
    products = (there * rotate_rows(query, for_query=True)).sum(-1)
    np.testing.assert_allclose(products, (x * query).sum(-1), rtol=1e-12, atol=1e-12)


def test_bytes_of_a_row():
    assert cache_row_bytes("int8", 10) == (14, 14)
    assert cache_row_bytes("int4", 64) == (44, 36)
    with pytest.raises(ValueError, match="head_dim a multiple of 32, got 48"):
        cache_row_bytes("int4", 48)


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.usefixtures("isa")
def test_a_query_that_is_not_finite_shows_in_its_own_row_alone(rng, dtype, bad, num_queries):
    case = paged(rng, [70], [num_queries], cache_dtype=dtype)
    clean, _ = ops.paged_attention(*case.arguments)
    case.query[0, 1, 3] = bad
    out, _ = ops.paged_attention(*case.arguments)
    assert np.isnan(out[0, 1]).all()
    out[0, 1] = clean[0, 1]
    assert_equal_bits(out, clean)


@DTYPES
@pytest.mark.parametrize("num_queries", [3, 40])
@pytest.mark.usefixtures("isa")
def test_a_later_token_that_is_far_larger_moves_no_earlier_row(rng, dtype, num_queries):
    """A tile's weights are relative to the scales that a row sees, not to those of later tokens."""
    case = paged(rng, [200], [num_queries], cache_dtype=dtype)
    clean, clean_lse = ops.paged_attention(*case.arguments)
    at = 200 - 2  # seen by the last two queries only
    larger = case.with_token(at, case.key[at] * 1000, case.value[at] * 1000)
    out, lse = ops.paged_attention(*larger.arguments)
    assert_equal_bits(out[:-2], clean[:-2])
    assert_equal_bits(lse[:-2], clean_lse[:-2])
    assert not np.array_equal(out[-2:], clean[-2:])


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("num_queries", [1, 2, 9])
@pytest.mark.usefixtures("isa")
def test_sums_of_the_greatest_integers_do_not_overflow(dtype, head_dim, num_queries):
    """128 equal keys, weights and values, each at an end of its range."""
    row = np.where(np.arange(head_dim) % 2, -1, 1).astype(np.float32)
    tokens = np.tile(row, (128, 1, 1))
    caches = empty_caches(dtype, (2, 1, 64, head_dim))
    ops.reshape_and_cache(tokens, tokens, *caches, int32(np.arange(128)))
    query = np.tile(row, (num_queries, 2, 1))
    out, lse = ops.paged_attention(
        query, *caches, int32([[0, 1]]), int32([128]), int32([0, num_queries])
    )
    np.testing.assert_allclose(out, query, rtol=1e-3)  # float16 scales of int4
    visible = np.arange(128 - num_queries, 128) + 1
    np.testing.assert_allclose(lse[:, 0], head_dim**0.5 + np.log(visible), rtol=1e-3)


def refused(case, error, message):
    """Every op that takes the caches refuses them before it writes."""
    caches = case.key_cache, case.value_cache
    before = [cache.payload.tobytes() for cache in caches]
    head_dim = caches[0].shape[3]
    row, at = np.ones((1, 2, head_dim), np.float32), int32([0])
    table = np.ones((1, head_dim // 2), np.float32)
    qkv = np.ones((1, 8 * head_dim), np.float32)
    for call in (
        lambda: ops.paged_attention(*case.arguments),
        lambda: ops.reshape_and_cache(row, row, *caches, at),
        lambda: ops.rope_and_cache(qkv, table, table, at, *caches, at),
        lambda: ops.copy_blocks(*caches, int32([[0, 1]])),
    ):
        with pytest.raises(error, match=message):
            call()
    assert [cache.payload.tobytes() for cache in caches] == before


@DTYPES
def test_keys_and_values_of_two_dtypes(rng, dtype):
    case = paged(rng, [40], [1], cache_dtype=dtype)
    other = unwritten_caches(case.value_cache.shape, "int4" if dtype == "int8" else "int8")[1]
    refused(replace(case, value_cache=other), TypeError, f"value_cache must be {dtype}")


@DTYPES
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("change", [-1, 64])
def test_payload_of_another_size(rng, dtype, name, change):
    case = paged(rng, [40], [1], cache_dtype=dtype)
    cache = getattr(case, name)
    wrong = replace(cache, payload=np.resize(cache.payload, cache.payload.size + change))
    message = f"{name} {dtype} .* must hold {cache.payload.size} bytes, got {wrong.payload.size}"
    refused(replace(case, **{name: wrong}), ValueError, message)


@DTYPES
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_read_only_payload(rng, dtype, name):
    case = paged(rng, [40], [1], cache_dtype=dtype)
    getattr(case, name).payload.flags.writeable = False
    row, at = np.ones((1, 2, 64), np.float32), int32([0])
    with pytest.raises(ValueError, match=f"{name} is written in place and must not be read-only"):
        ops.reshape_and_cache(row, row, case.key_cache, case.value_cache, at)
    with pytest.raises(ValueError, match=f"{name} is written in place and must not be read-only"):
        ops.copy_blocks(case.key_cache, case.value_cache, int32([[0, 1]]))
    ops.paged_attention(*case.arguments)  # only reads


@pytest.mark.parametrize("head_dim", [8, 48, 80])
def test_int4_with_a_head_dim_that_does_not_fit(rng, head_dim):
    case = paged(rng, [40], [1], head_dim=head_dim)
    caches = [
        ops.Quantized(np.zeros(100, np.uint8), "int4", cache.shape)
        for cache in (case.key_cache, case.value_cache)
    ]
    message = f"key_cache in int4 must have head_dim a multiple of 32, got {head_dim}"
    refused(replace(case, key_cache=caches[0], value_cache=caches[1]), ValueError, message)


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, *CACHE_DTYPES])
def test_empty_caches_lie_in_huge_pages(dtype):
    for cache in empty_caches(dtype, (40, 2, 16, 64)):
        numbers = getattr(cache, "payload", cache)
        assert cache.shape == (40, 2, 16, 64)
        assert not numbers.view(np.uint8).any()
        assert advised_huge_pages(numbers.ctypes.data)
        numbers.view(np.uint8)[...] = 1  # may be written
    for cache in empty_caches(dtype, (0, 2, 16, 64)):
        assert cache.shape == (0, 2, 16, 64)


def test_caches_that_memory_does_not_hold():
    with pytest.raises(MemoryError, match=r"no memory for a cache of .* GB"):
        empty_caches("int8", (2**37, 2, 16, 64))
