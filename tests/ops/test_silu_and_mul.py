"""silu_and_mul: every dtype, odd sizes, and the ends of exp's range."""

import numpy as np
import pytest
from helpers.builders import normal
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("hidden_dim", [1, 7, 16, 33, 100, 11008])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_against_the_oracle(rng, guarded, dtype, hidden_dim):
    gate_up = normal(rng, (3, 2 * hidden_dim), dtype, scale=4)
    out = guarded((3, hidden_dim), dtype)
    assert ops.silu_and_mul(gate_up, out=out) is out
    assert_rounded(out, reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_ends_of_the_range(dtype):
    gate = np.array([0, -0.0, 80, -80, 88.8, -88.8, 100, -100, 1e4, -1e4], np.float32)
    gate_up = np.concatenate([gate, np.full(10, 2, np.float32)])[None].astype(numpy_dtype(dtype))
    assert_rounded(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


def test_nan_stays_where_it_is(rng):
    gate_up = normal(rng, (2, 80))
    gate_up[0, 3] = gate_up[1, 39] = gate_up[1, 40] = np.nan
    assert np.argwhere(np.isnan(ops.silu_and_mul(gate_up))).tolist() == [[0, 3], [1, 0], [1, 39]]


def test_a_row_does_not_depend_on_the_others(rng):
    gate_up = normal(rng, (30, 2 * 1001))
    whole = ops.silu_and_mul(gate_up)
    for begin, end in [(0, 1), (17, 30)]:
        assert_equal_bits(ops.silu_and_mul(gate_up[begin:end]), whole[begin:end])
