"""int8 and fp8 caches on the device: quantised as they are written, and attention over them."""

import ml_dtypes
import numpy as np
import pytest
from device_arrays import get, poisoned, put
from helpers.builders import int32, normal, paged, rope_tables
from helpers.tolerances import assert_equal_bits, assert_lse

from codellama_rt.model.cuda import ops, tensor
from codellama_rt.ops import Quantized, reference

pytestmark = pytest.mark.usefixtures("cuda")
GROUP = 16


def quantized(cache, dtype):
    """(payload, the float32 cache that it stands for), as cache_layout.cuh writes it."""
    largest = np.abs(cache.astype(np.float32)).max(-1)
    limit = np.float32(127 if dtype == "int8" else 448)
    scale = (largest / limit).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    ratio = cache.astype(np.float32) * inverse[..., None]
    if dtype == "int8":
        values = np.rint(ratio).astype(np.int8)
    else:
        values = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    *lead, block_size, head_dim = cache.shape
    groups = values.view(np.uint8).reshape(*lead, block_size // GROUP, GROUP * head_dim)
    scales = scale.view(np.uint8).reshape(*lead, block_size // GROUP, GROUP * 4)
    payload = np.concatenate([groups, scales], axis=-1)
    return payload, values.astype(np.float32) * scale[..., None]


def on_device(cache, dtype):
    return Quantized(put(quantized(cache, dtype)[0]), dtype, cache.shape)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128, 144])
def test_rows_are_quantised_as_written(rng, head_dim, dtype):
    caches = [np.zeros((3, 2, 32, head_dim), np.float32) for _ in range(2)]
    there = [on_device(cache, dtype) for cache in caches]
    tables, positions, slots = (
        rope_tables(64, head_dim),
        int32([0, 63, 5, 9]),
        int32([17, -1, 0, 95]),
    )
    qkv = normal(rng, (4, 7 * head_dim), "bfloat16")
    qkv[2, -head_dim:] = 0  # a row of zeros has no scale
    qkv[3, -head_dim:] *= np.float32(1e-3)  # and small numbers are no matter
    ops.rope_and_cache(*put(qkv, *tables, positions), *there, put(slots))
    reference.rope_and_cache(qkv, *tables, positions, *caches, slots)
    for got, cache in zip(there, caches, strict=True):
        payload, stood_for = quantized(cache, dtype)
        if cache is caches[1]:  # values are not computed with: bit for bit
            assert_equal_bits(get(got.payload), payload)
        else:
            differ = get(got.payload) != payload
            assert differ.mean() < 0.01  # a rotation rounded otherwise turns a rounding
            assert stood_for.any()


def test_reshape_and_cache_writes_the_same_rows(rng):
    cache = normal(rng, (2, 2, 16, 128))
    there = [on_device(np.zeros_like(cache), "fp8") for _ in range(2)]
    rows = cache.transpose(0, 2, 1, 3).reshape(32, 2, 128)
    ops.reshape_and_cache(*put(rows, rows), *there, put(np.arange(32, dtype=np.int32)))
    for got in there:
        assert_equal_bits(get(got.payload), quantized(cache, "fp8")[0])


@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
@pytest.mark.parametrize("queries", [[1, 1, 1], [5, 1, 40]])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [("bfloat16", "int8"), ("bfloat16", "fp8"),
                                                    ("float16", "fp8")])  # fmt: skip
def test_attention(rng, dtype, cache_dtype, head_dim, queries, heads):
    block_size = 64 if head_dim == 128 else 16
    case = paged(
        rng, [300, 1, 90], queries, heads=heads, head_dim=head_dim, block_size=block_size,
        dtype=dtype,
    )  # fmt: skip
    caches = [np.nan_to_num(c, nan=0) for c in case.arguments[1:3]]
    there = [on_device(cache, cache_dtype) for cache in caches]
    stood_for = [quantized(cache, cache_dtype)[1] for cache in caches]
    query = case.query.astype(ml_dtypes.bfloat16) if head_dim == 128 else case.query
    out = poisoned(query.shape, dtype), poisoned(query.shape[:2], "float32")
    got, lse = get(
        *ops.paged_attention(put(case.query), *there, *put(*case.arguments[3:]), out=out)
    )
    expected, expected_lse = reference.paged_attention(query, *stood_for, *case.arguments[3:])
    assert np.abs(got.astype(np.float64) - expected).max() <= 2**-6
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_more_warps_with_fewer_stages_give_the_same_bits(rng, cuda, cache_dtype):
    """The other way to keep 24 tiles in flight: which is faster, a device will say."""
    case = paged(
        rng, [700, 90, 4500], [1, 3, 1], heads=(4, 2), head_dim=128, block_size=64,
        dtype="bfloat16",
    )  # fmt: skip
    caches = [np.nan_to_num(c, nan=0) for c in case.arguments[1:3]]
    arguments = put(case.query), *(on_device(c, cache_dtype) for c in caches)
    arguments += tuple(put(*case.arguments[3:]))
    expected = get(*ops.paged_attention(*arguments))
    cuda.set_decode_warps(8)
    try:
        for got, usual in zip(get(*ops.paged_attention(*arguments)), expected, strict=True):
            assert_equal_bits(got, usual)
    finally:
        cuda.set_decode_warps(4)
    with pytest.raises(ValueError, match="decode warps must be 4 or 8"):
        cuda.set_decode_warps(6)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_unused_slots_may_hold_anything(rng, cache_dtype):
    case = paged(rng, [70], [1], heads=(2, 2), head_dim=128, block_size=64, dtype="bfloat16")
    caches = [np.nan_to_num(c, nan=0) for c in case.arguments[1:3]]
    there = [on_device(cache, cache_dtype) for cache in caches]
    clean = get(*ops.paged_attention(put(case.query), *there, *put(*case.arguments[3:])))
    last = int(case.block_tables[0, 1])
    for cache in there:  # rows from 6 of the second page on: in its first group and the rest
        payload = get(cache.payload)
        payload[last, :, 0, 6 * 128 : GROUP * 128] = 0xFF
        payload[last, :, 0, GROUP * 128 + 6 * 4 :] = 0xFF
        payload[last, :, 1:] = 0xFF
        tensor.copy(cache.payload, payload)
    dirty = get(*ops.paged_attention(put(case.query), *there, *put(*case.arguments[3:])))
    for got, expected in zip(dirty, clean, strict=True):
        assert_equal_bits(got, expected)
