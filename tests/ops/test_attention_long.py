"""Attention to 131,072 keys against the float64 oracle."""

from functools import cache

import numpy as np
import pytest
from helpers.builders import paged
from helpers.tolerances import (
    MULTIPLIES_PAIRS,
    assert_attention,
    assert_lse,
    assert_within_bfloat16_unit,
)

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.quantized import CACHE_DTYPES

LENGTH = 131_072
BATCHES = {"decode": [1], "speculation": [5], "chunk": [12]}


@cache
def long_case(cache_dtype, batch):
    """A case of two query heads over one key/value head, and the oracle's answer."""
    rng = np.random.default_rng(LENGTH)
    case = paged(
        rng, [LENGTH], BATCHES[batch], heads=(2, 1), head_dim=64, block_size=64,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    return case, reference.paged_attention(*case.arguments)


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16", *CACHE_DTYPES])
@pytest.mark.parametrize("batch", ["decode", "speculation"])
@pytest.mark.usefixtures("isa")
def test_131072_keys(cache_dtype, batch):
    """Results in float32, the oracle taking the numbers as cached."""
    case, (expected, expected_lse) = long_case(cache_dtype, batch)
    results = [ops.paged_attention(*case.arguments)]
    if cache_dtype not in CACHE_DTYPES:
        results.append(ops.flash_attention(*case.contiguous))
    for out, lse in results:
        assert_attention(out, expected, cache_dtype)
        assert_lse(lse, expected_lse)


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_131072_keys_within_a_unit_of_bfloat16(cache_dtype):
    case, (expected, _) = long_case(cache_dtype, "speculation")
    out, _ = ops.paged_attention(*case.arguments)
    if cache_dtype == "bfloat16" and ops.isa() in MULTIPLIES_PAIRS:  # of the row, not the element
        error = np.linalg.norm(out - expected, axis=-1)
        assert (error <= np.linalg.norm(expected, axis=-1) * 2**-9).all()
    else:
        assert_within_bfloat16_unit(out, expected)


@pytest.mark.parametrize("cache_dtype", ["float32", "int4"])
def test_a_chunk_at_the_end_of_131072_keys(cache_dtype):
    case, (expected, _) = long_case(cache_dtype, "chunk")
    actual, _ = ops.paged_attention(*case.arguments)
    assert_attention(actual, expected, cache_dtype)
