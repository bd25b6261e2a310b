"""add_rms_norm: its sum is rounded once, and both results speak of that rounded sum."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, normal
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dim", [1, 15, 16, 33, 100, 4099])
@pytest.mark.parametrize(("dtype", "weight_dtype"), ACTIVATION_AND_STORED)
def test_against_the_oracle(rng, guarded, dtype, weight_dtype, dim):
    x, residual = normal(rng, (5, dim), dtype), normal(rng, (5, dim), dtype)
    weight = normal(rng, dim, weight_dtype)
    out = guarded((5, dim), dtype), guarded((5, dim), dtype)
    returned = ops.add_rms_norm(x, residual, weight, 1e-6, out=out)
    assert returned[0] is out[0]
    assert returned[1] is out[1]
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert_equal_bits(out[1], total.astype(x.dtype))
    assert_rounded(out[0], expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_is_the_sum_then_rms_norm(rng, dtype):
    x, residual, weight = (normal(rng, shape, dtype) for shape in ((9, 70), (9, 70), 70))
    out, total = ops.add_rms_norm(x, residual, weight)
    assert_equal_bits(out, ops.rms_norm(total, weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_in_place(rng, dtype):
    x, residual, weight = (normal(rng, shape, dtype) for shape in ((4, 50), (4, 50), 50))
    expected = ops.add_rms_norm(x, residual, weight)
    ops.add_rms_norm(x, residual, weight, out=(x, residual))
    assert_equal_bits(x, expected[0])
    assert_equal_bits(residual, expected[1])


def test_nan_stays_in_its_row(rng):
    x, residual, weight = normal(rng, (3, 40)), normal(rng, (3, 40)), normal(rng, 40)
    residual[1, 0] = np.nan
    out, total = ops.add_rms_norm(x, residual, weight)
    assert np.isnan(out).all(axis=1).tolist() == [False, True, False]
    assert np.argwhere(np.isnan(total)).tolist() == [[1, 0]]


@pytest.mark.parametrize("eps", [np.nan, np.inf, -1e-5])
def test_eps_that_cannot_be(eps):
    one = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="add_rms_norm: eps must be finite and not negative"):
        ops.add_rms_norm(one, one, one[0], eps)
