"""Causal masking: what a row does not see reaches no bit of it.

Values must be finite, as FlashAttention-3 and FlashInfer have it: the weight of a value that a row
does not see is 0, and 0 times infinity is NaN. Slots that no token was written to may hold
anything: the tests of attention put NaN there. Keys and queries may be NaN: masks are selections.
"""

import numpy as np
import pytest
from attention_cases import long_case, run
from helpers.tolerances import assert_equal_bits

pytestmark = pytest.mark.usefixtures("cuda")
LENGTH = 300
# queries a sequence, dtype, head_dim: the split kernel, wgmma's, and what takes any shape
KERNELS = [(9, "bfloat16", 128), (70, "bfloat16", 128), (70, "float16", 64)]


def written(case, back, cache, value):
    """Put `value` into the keys or values of the token `back` before the end."""
    page, offset = divmod(LENGTH - back, 64)
    cache[case.block_tables[0, page], :, offset] = value


@pytest.mark.parametrize(("queries", "dtype", "head_dim"), KERNELS)
def test_later_tokens_reach_no_earlier_row(rng, queries, dtype, head_dim):
    case = long_case(rng, queries, LENGTH, dtype=dtype, head_dim=head_dim)
    clean, clean_lse = run(case)
    written(case, 3, case.key_cache, 100)
    written(case, 3, case.value_cache, -100)
    out, lse = run(case)
    assert_equal_bits(out[:-3], clean[:-3])
    assert_equal_bits(lse[:-3], clean_lse[:-3])
    assert (lse[-3:] != clean_lse[-3:]).any()


@pytest.mark.parametrize("queries", [9, 70])
def test_a_key_that_is_no_number_stays_with_the_rows_that_see_it(rng, queries):
    case = long_case(rng, queries, LENGTH)
    clean, clean_lse = run(case)
    written(case, 3, case.key_cache, np.nan)
    out, lse = run(case)
    assert_equal_bits(out[:-3], clean[:-3])
    assert_equal_bits(lse[:-3], clean_lse[:-3])
    assert np.isnan(out[-3:].astype(np.float32)).all()


@pytest.mark.parametrize(("queries", "dtype", "head_dim"), [*KERNELS, (9, "float32", 40)])
def test_a_query_that_is_no_number_gives_none(rng, queries, dtype, head_dim):
    case = long_case(rng, queries, LENGTH, dtype=dtype, head_dim=head_dim)
    clean, clean_lse = run(case)
    case.query[4, 1] = np.nan
    out, lse = run(case)
    others = np.ones(clean_lse.shape, bool)
    others[4, 1] = False
    assert_equal_bits(out[others], clean[others])
    assert_equal_bits(lse[others], clean_lse[others])
    assert np.isnan(out[4, 1].astype(np.float32)).all()
    assert np.isnan(lse[4, 1])
