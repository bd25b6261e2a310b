"""rms_norm: every dtype pair, odd sizes, in place, and rows that do not see each other."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, normal
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 100, 4099])
@pytest.mark.parametrize(("dtype", "weight_dtype"), ACTIVATION_AND_STORED)
def test_against_the_oracle(rng, guarded, dtype, weight_dtype, dim):
    x, weight = normal(rng, (5, dim), dtype), normal(rng, dim, weight_dtype)
    out = guarded((5, dim), dtype)
    assert ops.rms_norm(x, weight, 1e-6, out=out) is out
    assert_rounded(out, reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_large_and_small_rows(rng, scale):
    x, weight = normal(rng, (3, 100), scale=scale), normal(rng, 100)
    assert_rounded(ops.rms_norm(x, weight, 0.0), reference.rms_norm(x, weight, 0.0))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_in_place(rng, dtype):
    x, weight = normal(rng, (4, 50), dtype), normal(rng, 50, dtype)
    expected = ops.rms_norm(x, weight)
    assert ops.rms_norm(x, weight, out=x) is x
    assert_equal_bits(x, expected)


def test_a_row_does_not_depend_on_the_others(rng):
    x, weight = normal(rng, (40, 4096)), normal(rng, 4096)
    whole = ops.rms_norm(x, weight)
    for begin, end in [(0, 1), (7, 8), (3, 20), (39, 40)]:
        assert_equal_bits(ops.rms_norm(x[begin:end], weight), whole[begin:end])


def test_row_of_zeros_gives_zeros():
    x = np.zeros((1, 40), np.float32)
    assert_equal_bits(ops.rms_norm(x, np.ones(40, np.float32)), x)


def test_nan_stays_in_its_row(rng):
    x, weight = normal(rng, (3, 40)), normal(rng, 40)
    x[1, 39] = np.nan
    assert np.isnan(ops.rms_norm(x, weight)).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("eps", [np.nan, np.inf, -1e-5])
def test_eps_that_cannot_be(eps):
    one = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="rms_norm: eps must be finite and not negative"):
        ops.rms_norm(one, one[0], eps)
