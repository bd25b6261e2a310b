"""Causal masking is exact: what a row does not see reaches no bit of it, not even NaN."""

import numpy as np
import pytest
from attention_cases import long_case, run, with_values
from device_arrays import get, put
from helpers.builders import paged
from helpers.tolerances import assert_equal_bits
from test_cuda_quantized_cache import on_device

from codellama_rt.model.cuda import ops

pytestmark = pytest.mark.usefixtures("cuda")
LENGTH = 300
# queries a sequence, dtype, head_dim: the split kernel, wgmma's, and mma.sync's unsplit one
KERNELS = [(9, "bfloat16", 128), (70, "bfloat16", 128), (70, "float16", 64), (9, "float16", 64)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("queries", "dtype", "head_dim"), KERNELS)
def test_a_value_that_is_not_finite_reaches_the_rows_that_see_it(
    rng, queries, dtype, head_dim, value
):
    case = long_case(rng, queries, LENGTH, dtype=dtype, head_dim=head_dim)
    clean, clean_lse = run(case)
    for back in (1, 4, queries - 1):  # rows from `first` on see the token
        at, first = LENGTH - back, queries - back
        changed, elements = with_values(case, at, value)
        out, lse = run(changed)
        assert_equal_bits(lse, clean_lse)
        assert_equal_bits(out[:first], clean[:first])
        assert_equal_bits(out[first:, :, ~elements], clean[first:, :, ~elements])
        hit = out[first:, :, elements].astype(np.float32)
        if np.isnan(value):
            assert np.isnan(hit).all()
        else:
            assert (hit == value).all()


@pytest.mark.parametrize(("queries", "dtype", "head_dim"), KERNELS)
def test_infinities_of_both_signs_are_no_number(rng, queries, dtype, head_dim):
    case = long_case(rng, queries, LENGTH, dtype=dtype, head_dim=head_dim)
    changed, _ = with_values(case, LENGTH - 2, np.inf)
    changed, elements = with_values(changed, LENGTH - 1, -np.inf)
    out = run(changed)[0][:, :, elements].astype(np.float32)
    assert np.isfinite(out[:-2]).all()
    assert (out[-2] == np.inf).all()
    assert np.isnan(out[-1]).all()


@pytest.mark.parametrize("queries", [9, 70])
def test_a_key_that_is_no_number_stays_with_the_rows_that_see_it(rng, queries):
    case = long_case(rng, queries, LENGTH)
    clean, clean_lse = run(case)
    page, offset = divmod(LENGTH - 3, 64)
    case.key_cache[case.block_tables[0, page], :, offset] = np.nan
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


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("queries", [9, 40])
def test_an_infinite_scale_stays_with_the_rows_that_see_it(rng, queries, cache_dtype):
    case = paged(rng, [90], [queries], heads=(2, 2), head_dim=128, block_size=64, dtype="bfloat16")
    caches = [np.nan_to_num(cache, nan=0) for cache in case.arguments[1:3]]
    there = [on_device(cache, cache_dtype) for cache in caches]
    clean = get(*ops.paged_attention(put(case.query), *there, *put(*case.arguments[3:])))
    caches[1][case.block_tables[0, 1], :, 90 - 64 - 2] = np.inf  # the last token but one
    with np.errstate(invalid="ignore"):
        there[1] = on_device(caches[1], cache_dtype)
    got = get(*ops.paged_attention(put(case.query), *there, *put(*case.arguments[3:])))
    assert_equal_bits(got[0][:-2], clean[0][:-2])
    assert_equal_bits(got[1], clean[1])
    assert not np.isfinite(got[0][-2:].astype(np.float32)).any()
