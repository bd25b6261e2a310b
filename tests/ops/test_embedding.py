"""embedding: exact where it widens, one correct rounding where it narrows."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, int32, normal
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype

pytestmark = pytest.mark.usefixtures("isa")

# Ties to even in both 16-bit formats, the largest and smallest numbers of each, and beyond them.
SPECIAL = [
    0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-8, 65504.0, 65519.9,
    65520.0, -65520.0, 3.3895e38, 3.4e38, 6.1e-5, 2**-24, 2**-25, 3 * 2**-25, 1e-8, 1.2e-38, 1e-40,
    2**-133, 2**-134, 3 * 2**-134, np.inf, -np.inf, np.nan,
]  # fmt: skip


@pytest.mark.parametrize("dim", [1, 15, 16, 33, 100])
@pytest.mark.parametrize(("out_dtype", "table_dtype"), ACTIVATION_AND_STORED)
def test_rows_of_the_table(rng, guarded, table_dtype, out_dtype, dim):
    table = normal(rng, (50, dim), table_dtype)
    token_ids = int32(rng.integers(0, 50, 37))
    out = guarded((37, dim), out_dtype)
    assert ops.embedding(token_ids, table, out=out) is out
    assert_equal_bits(out, table[token_ids].astype(numpy_dtype(out_dtype)))


@pytest.mark.parametrize("dim", [1, 26, 64])
@pytest.mark.parametrize(("out_dtype", "table_dtype"), ACTIVATION_AND_STORED)
def test_special_numbers_are_converted_as_numpy_does(table_dtype, out_dtype, dim):
    with np.errstate(over="ignore"):
        table = np.resize(np.array(SPECIAL, np.float32), (26, dim)).astype(numpy_dtype(table_dtype))
        expected = table.astype(numpy_dtype(out_dtype))
    out = ops.embedding(int32(range(26)), table, out=np.empty_like(expected))
    is_nan = np.isnan(expected)
    assert np.isnan(out[is_nan]).all()
    assert_equal_bits(out[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_result_is_float32_unless_out_says_otherwise(rng, dtype):
    table = normal(rng, (3, 20), dtype)
    assert_equal_bits(ops.embedding(int32([2, 0]), table), table[[2, 0]].astype(np.float32))


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_token_outside_the_table(bad):
    table, out = np.ones((50, 4), np.float32), np.zeros((3, 4), np.float32)
    message = rf"embedding: token_ids\[1\] must be in \[0, vocab_size=50\), got {bad}"
    with pytest.raises(ValueError, match=message):
        ops.embedding(int32([0, bad, 1]), table, out=out)
    assert not out.any()
