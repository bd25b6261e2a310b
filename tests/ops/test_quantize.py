"""quantize: its definition's bytes on every instruction set; GGUF's blocks as gguf reads them."""

import gguf
import numpy as np
import pytest
from helpers.builders import normal, quantized_weight
from helpers.tolerances import FLOAT32_RTOL, assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import (
    GGUF_BLOCKS,
    OWN_WEIGHT_DTYPES,
    WEIGHT_GROUPS,
    rotate_rows,
    weight_num_bytes,
)

OWN = pytest.mark.parametrize("dtype", OWN_WEIGHT_DTYPES)
# Of a group, in units of its largest element. int8 may clip that one, where the others gain by it.
LARGEST_ERROR = {"int8": 3.5 / 127, "int4": 1.1 / 15}
MEAN_SQUARE = {"int8": 0.3 / 127, "int4": 0.6 / 15}  # its root; rounding alone gives 0.29 of a step


@OWN
@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 100), (5, 1000)])
@pytest.mark.usefixtures("isa")
def test_bytes(rng, dtype, weight_dtype, shape):
    weight = normal(rng, shape, weight_dtype, 0.02)
    quantized = ops.quantize(weight, dtype)
    assert (quantized.dtype, quantized.shape) == (dtype, shape)
    assert quantized.nbytes == weight_num_bytes(dtype, shape)
    assert_equal_bits(
        quantized.payload, reference.quantize(weight.astype(np.float32), dtype).payload
    )


@OWN
@pytest.mark.usefixtures("isa")
def test_error(rng, dtype):
    """Each group on its own: neighbours a thousand times larger do not matter to int8."""
    weight, size = normal(rng, (50, 640)), WEIGHT_GROUPS[dtype]
    if dtype == "int8":
        weight[:, ::2] *= np.repeat(
            10.0 ** rng.integers(-3, 3, (50, 640 // size)), size // 2, axis=1
        )
    error = reference.dequantize(ops.quantize(weight, dtype)) - weight
    error, groups = error.reshape(50, -1, size), weight.reshape(50, -1, size)
    if dtype == "int8":  # it is the rotated elements that are rounded
        error, groups = (rotate_rows(x, for_query=False) for x in (error, groups))
    # int4: half a step of up to twice the largest element, and what rounding the codes adds
    error, largest = np.abs(error), np.abs(groups).max(axis=-1)
    assert (error.max(axis=-1) <= LARGEST_ERROR[dtype] * 1.01 * largest).all()
    root = np.sqrt(np.mean((error / largest[..., None]) ** 2))
    assert root <= MEAN_SQUARE[dtype]


@OWN
@pytest.mark.usefixtures("isa")
def test_extremes(rng, dtype):
    weight, most = normal(rng, (20, 96)), 5e36 if dtype == "int8" else 3e38
    weight[0] = 0
    weight[1], weight[2] = 1e-40, 1e-30
    weight[3, 5], weight[4], weight[5] = 1e30, most, np.linspace(-most, most, 96)
    quantized = ops.quantize(weight, dtype)
    assert_equal_bits(quantized.payload, reference.quantize(weight, dtype).payload)
    values = reference.dequantize(quantized)
    assert not values[:2].any()
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[2:6].max(axis=1), weight[2:6].max(axis=1), rtol=0.01)


@OWN
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("isa")
def test_what_is_not_finite_shows(rng, dtype, bad):
    weight = normal(rng, (20, 96))
    weight[7, 40] = bad
    quantized = ops.quantize(weight, dtype)
    is_nan = np.isnan(ops.linear(np.ones((1, 96), np.float32), quantized))[0]
    assert is_nan.nonzero()[0].tolist() == [7]


@OWN
def test_bytes_do_not_depend_on_threads(rng, threads, dtype):
    weight = normal(rng, (700, 320))
    expected = ops.quantize(weight, dtype).payload
    for num_threads in (1, 3):
        threads(num_threads)
        assert_equal_bits(ops.quantize(weight, dtype).payload, expected)


@OWN
@pytest.mark.parametrize("shape", [(0, 32), (16, 0), (0, 0)])
def test_nothing_to_do(dtype, shape):
    quantized = ops.quantize(np.empty(shape, np.float32), dtype)
    assert quantized.shape == shape
    out = ops.linear(np.ones((2, shape[1]), np.float32), quantized)
    assert_equal_bits(out, np.zeros((2, shape[0]), np.float32))


@pytest.mark.parametrize("dtype", ["q4_0", "int2", "float32"])
def test_a_dtype_that_is_not_made(dtype):
    with pytest.raises(ValueError, match=f"quantize: dtype must be int8 or int4, got '{dtype}'"):
        ops.quantize(np.ones((2, 2), np.float32), dtype)


def test_a_weight_that_is_no_float_matrix():
    with pytest.raises(TypeError, match=r"quantize: weight must be float32.* got int32 \(2, 2\)"):
        ops.quantize(np.ones((2, 2), np.int32), "int8")
    with pytest.raises(ValueError, match=r"quantize: weight must be .* got float32 \(2\)"):
        ops.quantize(np.ones(2, np.float32), "int8")
    with pytest.raises(ValueError, match=r"quantize: weight .* must be contiguous"):
        ops.quantize(np.ones((4, 4), np.float32)[:, ::2], "int8")


@pytest.mark.parametrize("dtype", sorted(GGUF_BLOCKS))
def test_blocks_stand_for_what_gguf_says(rng, dtype):
    weight = quantized_weight(rng, (9, 512), dtype)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    expected = gguf.quants.dequantize(weight.payload, kind)
    np.testing.assert_allclose(
        reference.dequantize(weight), expected, FLOAT32_RTOL, FLOAT32_RTOL * np.abs(expected).max()
    )
