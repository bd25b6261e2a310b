"""copy_blocks: whole blocks, in order."""

import numpy as np
import pytest
from helpers.builders import int32, normal, quantized_caches
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import CACHE_DTYPES

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("pairs", [[[0, 3]], [[0, 1], [1, 2], [4, 0]], [[2, 2], [5, 2], [2, 5]]])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_pages_in_order(rng, guarded, dtype, pairs):
    caches = [guarded((6, 3, 16, 10), dtype) for _ in range(2)]
    for cache in caches:
        cache[...] = normal(rng, cache.shape, dtype)
    expected = [cache.copy() for cache in caches]
    ops.copy_blocks(*caches, int32(pairs))
    reference.copy_blocks(*expected, int32(pairs))
    assert_equal_bits(caches[0], expected[0])
    assert_equal_bits(caches[1], expected[1])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_quantized_pages(rng, guarded, dtype):
    caches = quantized_caches(dtype, (6, 3, 32, 32), guarded)
    for cache in caches:
        cache.payload[...] = rng.integers(0, 256, cache.payload.shape, np.uint8)
    expected = [cache.copy() for cache in caches]
    pairs = int32([[0, 1], [1, 2], [4, 0], [3, 3]])
    ops.copy_blocks(*caches, pairs)
    reference.copy_blocks(*expected, pairs)
    for ours, theirs in zip(caches, expected, strict=True):
        assert_equal_bits(ours.payload, theirs.payload)


def test_nan_is_copied_bit_for_bit():
    payload = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32)
    cache = np.resize(payload, (2, 1, 16, 4)).view(np.float32)
    cache[1] = 0
    ops.copy_blocks(cache, cache.copy(), int32([[0, 1]]))
    assert_equal_bits(cache[1], cache[0])


@pytest.mark.parametrize("bad", [-1, 2])
def test_block_outside_the_cache(bad):
    cache = np.arange(2 * 16 * 4, dtype=np.float32).reshape(2, 1, 16, 4)
    before = cache.copy()
    message = rf"block_pairs\[3\] must be in \[0, num_blocks=2\), got {bad}"
    with pytest.raises(ValueError, match=f"copy_blocks: {message}"):
        ops.copy_blocks(cache, cache.copy(), int32([[0, 1], [1, bad]]))
    assert_equal_bits(cache, before)
