"""flash_attention against the float64 oracle; its equality with paged_attention is tested there."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, ends, int32, normal
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype

pytestmark = pytest.mark.usefixtures("isa")
# (keys, queries) of each sequence
BATCHES = {
    "one": ([1], [1]),
    "decode": ([1, 15, 16, 17, 300], [1] * 5),
    "prefill": ([63, 64, 65], [63, 64, 65]),
    "more queries than keys": ([5, 0, 70, 3], [9, 4, 100, 3]),
    "long": ([1100, 2050], [3, 140]),
}


def make(rng, batch, heads, head_dim, dtype="float32", key_dtype="float32"):
    keys, queries = BATCHES[batch]
    query = normal(rng, (sum(queries), heads[0], head_dim), dtype)
    key, value = (normal(rng, (sum(keys), heads[1], head_dim), key_dtype) for _ in range(2))
    return query, key, value, ends(queries), ends(keys)


def expected_of(arguments, **attributes):
    """The oracle's, of the query as the op takes it: rounded to bfloat16 over such keys."""
    query, key, *rest = arguments
    if key.dtype == numpy_dtype("bfloat16"):
        query = query.astype(key.dtype)
    return reference.flash_attention(query, key, *rest, **attributes)


def assert_rows(actual, expected, key_dtype):
    """Rows that see keys are close; the others are zeros with -inf."""
    sees = np.isfinite(expected[1])
    assert_attention(actual[0][sees], expected[0][sees], key_dtype)
    assert_lse(actual[1][sees], expected[1][sees])
    assert not actual[0][~sees].any()
    assert (actual[1][~sees] == -np.inf).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16"])
def test_lengths_and_head_ratios(rng, batch, heads, causal, key_dtype):
    arguments = make(rng, batch, heads, 32, key_dtype=key_dtype)
    actual = ops.flash_attention(*arguments, causal=causal)
    assert_rows(actual, expected_of(arguments, causal=causal), key_dtype)


@pytest.mark.parametrize("head_dim", [2, 30, 80, 128])
@pytest.mark.parametrize(("dtype", "key_dtype"), ACTIVATION_AND_STORED)
def test_dtypes_and_head_sizes(rng, guarded, dtype, key_dtype, head_dim):
    arguments = make(rng, "decode", (4, 2), head_dim, dtype, key_dtype)
    out = guarded(arguments[0].shape, dtype), guarded(arguments[0].shape[:2])
    returned = ops.flash_attention(*arguments, scale=0.3, out=out)
    assert returned[0] is out[0]
    assert returned[1] is out[1]
    assert_rows(out, expected_of(arguments, scale=0.3), key_dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_keys_of_other_sequences_are_not_seen(rng, dtype):
    query, key, value, q_ends, k_ends = make(rng, "prefill", (2, 1), 64, dtype, dtype)
    clean, _ = ops.flash_attention(query, key, value, q_ends, k_ends)
    key[k_ends[1] : k_ends[2]] = np.nan
    out, _ = ops.flash_attention(query, key, value, q_ends, k_ends)
    assert_equal_bits(out[: q_ends[1]], clean[: q_ends[1]])
    assert_equal_bits(out[q_ends[2] :], clean[q_ends[2] :])
    assert np.isnan(out[q_ends[1] : q_ends[2]]).all()


@pytest.mark.parametrize("causal", [True, False])
def test_threads(rng, threads, causal):
    arguments = make(rng, "long", (4, 2), 32)
    threads(1)
    expected = ops.flash_attention(*arguments, causal=causal)
    threads(3)
    assert_equal_bits(ops.flash_attention(*arguments, causal=causal)[0], expected[0])


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("bad", [[1, 3, 5], [0, 6, 5], [0, 3, 4], [0, -1, 5]])
def test_offsets_that_do_not_rise_to_the_total(rng, name, bad):
    x = normal(rng, (5, 2, 8))
    offsets = {"cu_seqlens_q": ends([3, 2]), "cu_seqlens_k": ends([3, 2])} | {name: int32(bad)}
    total = "num_tokens=5" if name.endswith("q") else "num_keys=5"
    with pytest.raises(ValueError, match=f"flash_attention: {name} must rise from 0 to {total}"):
        ops.flash_attention(x, x, x, **offsets)
