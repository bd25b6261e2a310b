"""Every tolerance of the tests, each with its reason, and the comparisons that apply them.

Copies, integers and everything that determinism promises are compared for equal bits instead.
"""

import ml_dtypes
import numpy as np

from codellama_rt import ops
from codellama_rt.ops.quantized import CACHE_DTYPES

# Elementwise float32 arithmetic against float64: a few roundings of 6e-8, exp within 2 ulp.
FLOAT32_RTOL = FLOAT32_ATOL = 1e-5

# 16-bit results are rounded once, from float32: where that rounding goes the other way than the
# oracle's, the result is its neighbour. Sums that cancel add what float32 loses on terms of size 1.
UNITS_IN_LAST_PLACE = 1
SIXTEEN_BIT_ATOL = 1e-6

# A dot product in float32, relative to the sum of |x w|: 16 chains of up to 700 roundings and a
# tree, which err to both sides; the worst case would be 4e-5.
DOT_RTOL = 2e-6

# Attention's largest error of a row relative to its largest element, float32 all the way.
ATTENTION_RTOL = 1e-5
# The same over int8 and int4 caches where bytes are multiplied: weights are rounded to 16 bits of
# the tile's greatest. The second is absolute, for rows whose values of unit scale cancel.
MULTIPLIES_BYTES = ("avx512_vnni", "avx512_bf16")
ATTENTION_QUANTIZED_RTOL = 1e-4
ATTENTION_QUANTIZED_ATOL = 2e-5
# The same over bfloat16 caches where pairs of bfloat16 are multiplied: weights are rounded to
# bfloat16, each by 2^-9 of itself at most, and values of unit scale may cancel.
MULTIPLIES_PAIRS = ("avx512_bf16",)
ATTENTION_BFLOAT16_RTOL = ATTENTION_BFLOAT16_ATOL = 2e-3
# The same where bfloat16 or float16 results are compared with the rounded oracle, at unit scale.
ATTENTION_16BIT_ATOL = 2e-3
# log-sum-exp, natural: its scores are dot products in float32.
LSE_ATOL = 2e-5

# Logits of tiny models in float32 against Transformers' goldens.
LOGITS_ATOL = 1e-4
# Log-probabilities against a float64 log-softmax of the same float32 logits.
LOGPROB_ATOL = 1e-5
# SmolLM2's perplexity of the golden texts, relative.
PERPLEXITY_FLOAT32_RTOL = 1e-3
PERPLEXITY_BFLOAT16_RTOL = 5e-3
# Steps of a golden continuation whose two likeliest tokens are closer than this may go either way.
LOW_MARGIN = 0.02


def assert_equal_bits(actual, expected) -> None:
    """Same dtype, shape and bytes: tells -0 from 0 and NaN from NaN of other bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    unsigned = np.dtype(f"u{actual.itemsize}")
    differ = np.ascontiguousarray(actual).view(unsigned) != np.ascontiguousarray(expected).view(
        unsigned
    )
    assert not differ.any(), f"{differ.sum()} of {differ.size} differ, first at {_first(differ)}"


def assert_rounded(actual, expected) -> None:
    """`actual` is the float64 `expected`, computed in float32 and rounded once to its own dtype."""
    expected = np.asarray(expected, np.float64)
    if actual.dtype == np.float32:
        np.testing.assert_allclose(actual, expected, FLOAT32_RTOL, FLOAT32_ATOL)
    else:
        _assert_near(actual, expected, SIXTEEN_BIT_ATOL)


def assert_dot(actual, expected, magnitude) -> None:
    """`actual` is a dot product in float32; `magnitude` sums its terms' absolute values."""
    _assert_near(actual, np.asarray(expected, np.float64), DOT_RTOL * magnitude)


def assert_attention(actual, expected, cache_dtype="float32") -> None:
    """`actual` (num_tokens, n_heads, head_dim) is the float64 attention `expected`."""
    if actual.dtype != np.float32:
        _assert_near(actual, expected, ATTENTION_16BIT_ATOL)
        return
    error = np.abs(actual - expected).max(axis=-1)
    largest = np.abs(expected).max(axis=-1)
    rtol, atol = ATTENTION_RTOL, 0.0
    if str(cache_dtype) in CACHE_DTYPES and ops.isa() in MULTIPLIES_BYTES:
        rtol, atol = ATTENTION_QUANTIZED_RTOL, ATTENTION_QUANTIZED_ATOL
    if str(cache_dtype) == "bfloat16" and ops.isa() in MULTIPLIES_PAIRS:
        rtol, atol = ATTENTION_BFLOAT16_RTOL, ATTENTION_BFLOAT16_ATOL
    assert (error <= rtol * largest + atol).all(), (error / largest).max()


def assert_within_bfloat16_unit(actual, expected) -> None:
    """Rounded to bfloat16, `actual` is the rounded float64 `expected` or its neighbour."""
    actual, expected = (np.asarray(x).astype(ml_dtypes.bfloat16) for x in (actual, expected))
    steps = actual.view(np.int16).astype(np.int32) - expected.view(np.int16).astype(np.int32)
    assert (np.abs(steps) <= UNITS_IN_LAST_PLACE).all(), np.abs(steps).max()


def assert_lse(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32_RTOL, atol=LSE_ATOL)


def _assert_near(actual, expected, atol) -> None:
    """Within a unit in the last place of the rounded `expected`, plus `atol`."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = expected.astype(actual.dtype)
        unit = np.abs(np.spacing(rounded)).astype(np.float64)
        error = np.abs(actual.astype(np.float64) - rounded.astype(np.float64))
        near = error <= UNITS_IN_LAST_PLACE * unit + atol
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    wrong = ~(near | same)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} differ, first at {_first(wrong)}: "
        f"{actual[_first(wrong)]} for {expected[_first(wrong)]}"
    )


def _first(mask) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])
