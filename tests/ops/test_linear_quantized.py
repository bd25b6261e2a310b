"""linear and embedding over quantised weights: the arithmetic of their definition, and its bits."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, int32, normal, quantized_weight
from helpers.tolerances import assert_dot, assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import Quantized, reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import GGUF_BLOCKS, OWN_WEIGHT_DTYPES

# Those in tiles have the bits of the blocks they are made of: test_repack.py.
EVERY_FORMAT = pytest.mark.parametrize("dtype", [*OWN_WEIGHT_DTYPES, *GGUF_BLOCKS])
COUNTS = (1, 2, 3, 6, 7, 16, 17, 64, 100)  # of tokens: one panel, several, and all that is between


def assert_linear(out, x, weights):
    """Only the float32 chain over the groups may differ from float64."""
    magnitude = np.concatenate(
        [np.abs(reference.rounded_to_int8(x, w.dtype)) @ terms(w).T for w in weights], axis=-1
    )
    assert_dot(out, reference.linear(x, weights), magnitude)


def terms(weight):
    """Largest sizes of the terms that a group adds: |value * scale| + |minimum|, at most."""
    groups = np.abs(reference.dequantize(weight, rotated=True))
    largest = groups.max(axis=1, keepdims=True)
    has_minimum = weight.dtype in ("int4", "q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
    return np.maximum(groups, 2 * largest) if has_minimum else groups


def width(dtype):
    """A row that is no multiple of what a chunk holds."""
    return 2304 if dtype.endswith("_k") else 608 + 32 * (dtype in GGUF_BLOCKS)


@EVERY_FORMAT
@pytest.mark.parametrize("rows", [(1,), (16,), (37,), (5, 48), (33, 16, 70)])
def test_against_the_oracle(rng, guarded, isa, dtype, rows):
    weights = tuple(quantized_weight(rng, (n, 512), dtype) for n in rows)
    for num_tokens in COUNTS:
        x = normal(rng, (num_tokens, 512))
        out = guarded((num_tokens, sum(rows)))
        assert ops.linear(x, weights, out=out) is out
        assert_linear(out, x, weights)


@pytest.mark.parametrize("dtype", OWN_WEIGHT_DTYPES)
@pytest.mark.parametrize("in_features", [1, 31, 33, 100, 176, 1027])
@pytest.mark.usefixtures("isa")
def test_any_width_of_own_formats(rng, guarded, dtype, in_features):
    weight = quantized_weight(rng, (21, in_features), dtype)
    for num_tokens in (1, 7, 20):
        x = normal(rng, (num_tokens, in_features))
        out = guarded((num_tokens, 21))
        assert_linear(ops.linear(x, weight, out=out), x, (weight,))


@EVERY_FORMAT
@pytest.mark.parametrize(("x_dtype", "out_dtype"), ACTIVATION_AND_STORED)
def test_activations_and_results_of_any_dtype(rng, guarded, dtype, x_dtype, out_dtype):
    weight = quantized_weight(rng, (19, 256), dtype)
    for num_tokens in (1, 9):
        x = normal(rng, (num_tokens, 256), x_dtype)
        out = guarded((num_tokens, 19), out_dtype)
        assert_linear(ops.linear(x, weight, out=out), x, (weight,))


@EVERY_FORMAT
@pytest.mark.usefixtures("isa")
def test_row_bits_do_not_depend_on_num_tokens(rng, dtype):
    k = width(dtype)
    weight, x = quantized_weight(rng, (77, k), dtype), normal(rng, (100, k))
    alone = np.concatenate([ops.linear(row[None], weight) for row in x])
    for num_tokens in (*range(2, 28), 64, 99):
        first = (100 - num_tokens) // 2
        many = ops.linear(x[first : first + num_tokens], weight)
        assert_equal_bits(many, alone[first : first + num_tokens])


@pytest.mark.parametrize("num_tokens", [516, 517, 1100])
@EVERY_FORMAT
def test_row_bits_in_long_prompts(rng, dtype, num_tokens):
    weight, x = quantized_weight(rng, (20, 256), dtype), normal(rng, (num_tokens, 256))
    whole = ops.linear(x, weight)
    for row in (0, 5, 511, num_tokens - 1):
        assert_equal_bits(ops.linear(x[row : row + 1], weight), whole[row : row + 1])


@EVERY_FORMAT
def test_bits_do_not_depend_on_threads_nor_on_wider_instructions(rng, threads, dtype):
    weight, x = quantized_weight(rng, (300, 512), dtype), normal(rng, (40, 512))
    expected = ops.linear(x, weight)
    for isa in ops.available_isas():
        if isa == "baseline":  # it has no fused multiply-add
            continue
        ops.set_isa(isa)
        for num_threads in (1, 2, 3):
            threads(num_threads)
            for num_tokens in (1, 8, 32, 40):  # one task, or several
                assert_equal_bits(ops.linear(x[:num_tokens], weight), expected[:num_tokens])


@EVERY_FORMAT
def test_bits_do_not_depend_on_how_the_weight_is_split(rng, dtype):
    parts = tuple(quantized_weight(rng, (n, 512), dtype) for n in (16, 33, 8))
    for num_tokens in (1, 5, 40):
        x = normal(rng, (num_tokens, 512))
        apart = np.concatenate([ops.linear(x, part) for part in parts], axis=1)
        assert_equal_bits(ops.linear(x, parts), apart)


@EVERY_FORMAT
@pytest.mark.usefixtures("isa")
def test_rows_may_lie_apart(rng, dtype):
    weight = quantized_weight(rng, (12, 256), dtype)
    wide_x, wide_out = normal(rng, (10, 300)), np.full((10, 20), 7, np.float32)
    ops.linear(wide_x[:, 5:261], weight, out=wide_out[:, 3:15])
    assert_equal_bits(wide_out[:, 3:15], ops.linear(wide_x[:, 5:261].copy(), weight))
    assert (wide_out[:, :3] == 7).all()
    assert (wide_out[:, 15:] == 7).all()


@EVERY_FORMAT
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("isa")
def test_what_is_not_finite_makes_its_token_nan(rng, dtype, bad):
    """Even over weights that are zero there: it must not vanish in a group's rounding."""
    weight, x = quantized_weight(rng, (40, 512), dtype), normal(rng, (20, 512))
    x[3, 511] = x[11, 0] = bad
    is_nan = np.isnan(ops.linear(x, weight))
    assert is_nan[[3, 11]].all()
    assert is_nan.sum() == 80
    zero = Quantized(np.zeros_like(weight.payload), dtype, weight.shape)
    assert np.isnan(ops.linear(x, zero)[[3, 11]]).all()


@EVERY_FORMAT
@pytest.mark.usefixtures("isa")
def test_extremes(rng, dtype):
    """Zeros, one element that hides the rest of its group, the tiny and the huge."""
    weight = quantized_weight(rng, (24, 512), dtype)
    x = np.zeros((5, 512), np.float32)
    x[1] = normal(rng, 512)
    x[1, 40] = 1e6
    x[2] = 1e-38
    x[3], x[4, 3] = 1e30, -1e36
    out = ops.linear(x, weight)
    assert not out[[0, 2]].any(), "below 2^-100 a group counts as zeros"
    assert_linear(out, x, (weight,))


@EVERY_FORMAT
def test_no_tokens(rng, dtype):
    weight = quantized_weight(rng, (24, 512), dtype)
    assert ops.linear(np.empty((0, 512), np.float32), weight).shape == (0, 24)


@EVERY_FORMAT
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_embedding(rng, guarded, dtype, out_dtype):
    table = quantized_weight(rng, (50, 2304), dtype)
    token_ids = int32(rng.integers(0, 50, 37))
    out = ops.embedding(token_ids, table, out=guarded((37, 2304), out_dtype))
    expected = reference.embedding(token_ids, table)
    assert_dot(out, expected, np.abs(expected).max())


@pytest.mark.parametrize("dtype", OWN_WEIGHT_DTYPES)
def test_embedding_of_any_width(rng, guarded, dtype):
    table = quantized_weight(rng, (33, 70), dtype)
    out = ops.embedding(int32(range(33)), table, out=guarded((33, 70)))
    expected = reference.dequantize(table)
    assert_dot(out, expected, np.abs(expected).max())


@EVERY_FORMAT
def test_a_payload_of_another_size(rng, dtype):
    weight = quantized_weight(rng, (16, 256), dtype)
    short = Quantized(weight.payload.reshape(-1)[:-1], dtype, weight.shape)
    message = rf"linear: weight {dtype} \(16, 256\) must hold {weight.nbytes} bytes, got"
    with pytest.raises(ValueError, match=message):
        ops.linear(np.ones((1, 256), np.float32), short)
    with pytest.raises(ValueError, match=r"embedding: table .* must hold"):
        ops.embedding(int32([0]), short)


@pytest.mark.parametrize("dtype", sorted(GGUF_BLOCKS))
def test_a_width_that_is_no_whole_number_of_blocks(dtype):
    elements = GGUF_BLOCKS[dtype][0]
    weight = Quantized(np.zeros(64, np.uint8), dtype, (1, elements + 16))
    message = f"linear: weight in {dtype} must have in_features a multiple of {elements}, got"
    with pytest.raises(ValueError, match=message):
        ops.linear(np.ones((1, elements + 16), np.float32), weight)


def test_weights_of_two_formats(rng):
    x = np.ones((1, 256), np.float32)
    weights = [quantized_weight(rng, (16, 256), dtype) for dtype in ("int8", "q8_0")]
    with pytest.raises(TypeError, match=r"linear: weight must be int8 .* got q8_0 \(16, 256\)"):
        ops.linear(x, weights)
    with pytest.raises(TypeError, match=r"linear: weight must be int8 .* got float32"):
        ops.linear(x, (weights[0], np.ones((16, 256), np.float32)))
