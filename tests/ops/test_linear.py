"""linear: float32 sums against float64, and rows whose bits depend on nothing but themselves."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_STORED, normal
from helpers.tolerances import assert_dot, assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype

WEIGHT_SPLITS = [(77,), (64, 13), (32, 16, 29), (1, 75, 1)]
# (in_features, rows of the weights): not multiples of any vector, tile or panel, and of all.
SHAPES = [(1, (1,)), (15, (3,)), (33, (17,)), (100, (5, 6)), (256, (64,)), (1027, (9, 4, 4))]


def as_multiplied(x, weight_dtype, isa):
    """x as the dot product takes it: bfloat16 over such weights where the CPU multiplies pairs."""
    rounds = isa == "avx512_bf16" and weight_dtype == "bfloat16"
    return x.astype(numpy_dtype("bfloat16")) if rounds else x


def assert_linear(out, x, weights, isa):
    x = as_multiplied(x, weights[0].dtype.name, isa)
    magnitude = reference.linear(np.abs(x), tuple(np.abs(w) for w in weights))
    assert_dot(out, reference.linear(x, weights), magnitude)


@pytest.mark.parametrize(("in_features", "rows"), SHAPES)
@pytest.mark.parametrize(("dtype", "weight_dtype"), ACTIVATION_AND_STORED)
def test_against_the_oracle(rng, guarded, isa, dtype, weight_dtype, in_features, rows):
    weights = tuple(normal(rng, (n, in_features), weight_dtype) for n in rows)
    for num_tokens in (1, 2, 3, 7, 30):
        x = normal(rng, (num_tokens, in_features), dtype)
        out = guarded((num_tokens, sum(rows)), dtype)
        assert ops.linear(x, weights, out=out) is out
        assert_linear(out, x, weights, isa)


@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6, 517])
def test_code_llama_width(rng, isa, weight_dtype, num_tokens):
    x, weight = normal(rng, (num_tokens, 4096)), normal(rng, (40, 4096), weight_dtype)
    assert_linear(ops.linear(x, weight), x, (weight,), isa)


@pytest.mark.parametrize(("out_dtype", "weight_dtype"), ACTIVATION_AND_STORED)
def test_out_of_any_dtype(rng, guarded, isa, out_dtype, weight_dtype):
    x, weight = normal(rng, (9, 70)), normal(rng, (21, 70), weight_dtype)
    out = guarded((9, 21), out_dtype)
    assert_linear(ops.linear(x, weight, out=out), x, (weight,), isa)


@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 8, 50, 600])
@pytest.mark.usefixtures("isa")
def test_sums_of_nothing_are_zero(guarded, weight_dtype, num_tokens):
    weight = np.empty((21, 0), numpy_dtype(weight_dtype))
    out = guarded((num_tokens, 21))
    ops.linear(np.empty((num_tokens, 0), np.float32), weight, out=out)
    assert not out.any()


@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("in_features", [70, 1027, 4500])
@pytest.mark.usefixtures("isa")
def test_row_bits_do_not_depend_on_num_tokens(rng, weight_dtype, in_features):
    """Few tokens and many, of one segment of k and of several, which are cut in runs."""
    weight = normal(rng, (77, in_features), weight_dtype)
    x = normal(rng, (64, in_features))
    alone = np.concatenate([ops.linear(row[None], weight) for row in x])
    for num_tokens in range(2, 65):
        first = num_tokens // 3
        many = ops.linear(x[first : first + num_tokens], weight)
        assert_equal_bits(many, alone[first : first + num_tokens])


@pytest.mark.parametrize("in_features", [130, 1100])
@pytest.mark.parametrize("num_tokens", [512, 516, 517, 1100])
@pytest.mark.usefixtures("isa")
def test_row_bits_in_long_prompts(rng, num_tokens, in_features):
    weight = normal(rng, (20, in_features), "bfloat16")
    x = normal(rng, (num_tokens, in_features))
    whole = ops.linear(x, weight)
    for row in (0, 5, 511, num_tokens - 1):
        assert_equal_bits(ops.linear(x[row : row + 1], weight), whole[row : row + 1])


@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rows", WEIGHT_SPLITS)
@pytest.mark.usefixtures("isa")
def test_bits_do_not_depend_on_how_the_weight_is_split(rng, weight_dtype, rows):
    for num_tokens, in_features in [(1, 130), (5, 130), (40, 130), (1, 4500), (300, 1100)]:
        weight = normal(rng, (77, in_features), weight_dtype)
        parts = tuple(np.split(weight, np.cumsum(rows)[:-1]))
        x = normal(rng, (num_tokens, in_features))
        assert_equal_bits(ops.linear(x, parts), ops.linear(x, weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_rows_may_lie_apart(rng, dtype):
    """A slice of wider rows, in and out; what lies between the rows of `out` stays."""
    wide_x, weight = normal(rng, (10, 50), dtype), normal(rng, (12, 30))
    wide_out = np.full((10, 20), 7, wide_x.dtype)
    ops.linear(wide_x[:, 5:35], weight, out=wide_out[:, 3:15])
    assert_equal_bits(wide_out[:, 3:15], ops.linear(wide_x[:, 5:35].copy(), weight))
    assert (wide_out[:, :3] == 7).all()
    assert (wide_out[:, 15:] == 7).all()


@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_stay_in_their_row_and_column(rng, weight_dtype):
    weight, x = normal(rng, (40, 67), weight_dtype), normal(rng, (20, 67))
    x[3, 66], x[11, 0] = np.nan, np.inf
    weight[17, 66] = np.nan
    finite = np.isfinite(ops.linear(x, weight))
    expected = np.ones((20, 40), bool)
    expected[[3, 11]] = expected[:, 17] = False
    assert (finite == expected).all()


@pytest.mark.usefixtures("isa")
def test_exact_where_every_sum_is():
    """Small integers: any order of summation gives the same float32, so any error is a bug."""
    x = (np.arange(13 * 200).reshape(13, 200) % 7 - 3).astype(np.float32)
    weight = (np.arange(31 * 200).reshape(31, 200) % 5 - 2).astype(np.float32)
    for weight_dtype in FLOAT_DTYPES:
        out = ops.linear(x, weight.astype(numpy_dtype(weight_dtype)))
        assert_equal_bits(out, x @ weight.T)


def test_too_many_weights():
    x, weight = np.ones((1, 4), np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="linear: takes 1 to 3 weights, got 4"):
        ops.linear(x, (weight,) * 4)
    with pytest.raises(ValueError, match="linear: takes 1 to 3 weights, got 0"):
        ops.linear(x, (), out=np.zeros((1, 0), np.float32))


def test_weights_of_two_dtypes():
    x, weight = np.ones((1, 4), np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(TypeError, match=r"linear: weight must be float32 .* got float16 \(2, 4\)"):
        ops.linear(x, (weight, weight.astype(np.float16)))
