"""merge_attention: two halves make the whole, and a side without keys is not read."""

import numpy as np
import pytest
from helpers.builders import ends, normal
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("isa")


def halves(rng, shape, dtype):
    return [part for _ in range(2) for part in (normal(rng, shape, dtype), normal(rng, shape[:2]))]


@pytest.mark.parametrize("head_dim", [1, 16, 33, 128])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_against_the_oracle(rng, guarded, dtype, head_dim):
    shape = (7, 3, head_dim)
    arguments = halves(rng, shape, dtype)
    arguments[1] *= 30  # one side outweighs the other by far
    out = guarded(shape, dtype), guarded(shape[:2])
    returned = ops.merge_attention(*arguments, out=out)
    assert returned[0] is out[0]
    assert returned[1] is out[1]
    expected, expected_lse = reference.merge_attention(*arguments)
    assert_rounded(out[0], expected)
    assert_lse(out[1], expected_lse)


def test_two_halves_of_the_keys(rng):
    query, key, value = (normal(rng, (n, 2, 64)) for n in (5, 90, 90))
    whole = reference.flash_attention(query, key, value, ends([5]), ends([90]), causal=False)
    parts = []
    for half in (slice(0, 40), slice(40, 90)):
        offsets = ends([5]), ends([half.stop - half.start])
        parts += ops.flash_attention(query, key[half], value[half], *offsets, causal=False)
    out, lse = ops.merge_attention(*parts)
    assert_attention(out, whole[0])
    assert_lse(lse, whole[1])


@pytest.mark.parametrize("empty", [0, 2])
def test_a_side_without_keys_is_not_read(rng, empty):
    arguments = halves(rng, (4, 2, 20), "float32")
    arguments[empty][...] = np.nan
    arguments[empty + 1][...] = -np.inf
    out, lse = ops.merge_attention(*arguments)
    assert_equal_bits(out, arguments[2 - empty])
    assert_equal_bits(lse, arguments[3 - empty])


def test_no_side_has_keys():
    zeros, none = np.zeros((1, 1, 20), np.float32), np.full((1, 1), -np.inf, np.float32)
    out, lse = ops.merge_attention(zeros, none, zeros, none)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_in_place(rng):
    arguments = halves(rng, (4, 2, 20), "float32")
    expected = ops.merge_attention(*arguments)
    ops.merge_attention(*arguments, out=(arguments[0], arguments[1]))
    assert_equal_bits(arguments[0], expected[0])
    assert_equal_bits(arguments[1], expected[1])


@pytest.mark.parametrize("side", [0, 2])
def test_nan_stays_in_its_head(rng, side):
    arguments = halves(rng, (4, 2, 20), "float32")
    arguments[side][1, 0, 7] = np.nan
    out, _ = ops.merge_attention(*arguments)
    assert np.argwhere(np.isnan(out)).tolist() == [[1, 0, 7]]
