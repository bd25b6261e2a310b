"""Attention to 131,072 keys against the float64 oracle."""

from functools import cache

import numpy as np
import pytest
from builders import paged
from tolerances import assert_attention, assert_lse

from codellama_rt import ops
from codellama_rt.ops import reference

LENGTH = 131_072
BATCHES = {"decode": [1], "speculation": [5], "chunk": [12]}


@cache
def long_case(dtype, batch):
    """A case of two query heads over one key/value head, and the oracle's answer."""
    rng = np.random.default_rng(LENGTH)
    case = paged(
        rng, [LENGTH], BATCHES[batch], heads=(2, 1), head_dim=64, block_size=64, dtype=dtype,
        cache_dtype=dtype,
    )  # fmt: skip
    return case, reference.paged_attention(*case.arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", ["decode", "speculation"])
@pytest.mark.usefixtures("isa")
def test_131072_keys(dtype, batch):
    case, (expected, expected_lse) = long_case(dtype, batch)
    for out, lse in (
        ops.paged_attention(*case.arguments),
        ops.flash_attention(*case.contiguous),
    ):
        assert_attention(out, expected)
        assert_lse(lse, expected_lse)


def test_a_chunk_at_the_end_of_131072_keys():
    case, (expected, _) = long_case("float32", "chunk")
    assert_attention(ops.paged_attention(*case.arguments)[0], expected)
