"""reshape_and_cache: each row in its slot and nothing else touched."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_CACHED, int32, normal, quantized_caches
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.quantized import CACHE_DTYPES

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 30), (2, 128), (1, 160)])  # n_kv_heads, head_dim
@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_CACHED)
def test_rows_go_to_their_slots(rng, guarded, dtype, cache_dtype, shape, block_size):
    n_kv_heads, head_dim = shape
    if cache_dtype == "int4" and head_dim % 32:
        pytest.skip("an int4 cache is refused here, as test_quantized_caches.py shows")
    key, value = (normal(rng, (block_size + 3, *shape), dtype) for _ in range(2))
    cache_shape = (4, n_kv_heads, block_size, head_dim)
    if cache_dtype in CACHE_DTYPES:
        caches = quantized_caches(cache_dtype, cache_shape, guarded)
    else:
        caches = [guarded(cache_shape, cache_dtype) for _ in range(2)]
        for cache in caches:
            cache[...] = np.nan
    expected = [cache.copy() for cache in caches]
    slots = int32(rng.permutation(4 * block_size)[: len(key)])
    slots[[0, 5]] = -1
    ops.reshape_and_cache(key, value, *caches, slots)
    reference.reshape_and_cache(key, value, *expected, slots)
    for ours, theirs in zip(caches, expected, strict=True):
        quantized = cache_dtype in CACHE_DTYPES
        assert_equal_bits(*((ours.payload, theirs.payload) if quantized else (ours, theirs)))


def test_only_skipped_slots_write_nothing(rng):
    key, cache = normal(rng, (3, 2, 8)), normal(rng, (1, 2, 16, 8))
    before = cache.copy()
    ops.reshape_and_cache(key, key, cache, cache.copy(), int32([-1, -1, -1]))
    assert_equal_bits(cache, before)


@pytest.mark.parametrize("bad", [-2, 32])
def test_slot_outside_the_cache(rng, bad):
    key, cache = normal(rng, (2, 1, 4)), np.zeros((2, 1, 16, 4), np.float32)
    message = rf"slot_mapping\[1\] must be in \[-1, num_blocks \* block_size=32\), got {bad}"
    with pytest.raises(ValueError, match=f"reshape_and_cache: {message}"):
        ops.reshape_and_cache(key, key, cache, cache.copy(), int32([0, bad]))
    assert not cache.any()
