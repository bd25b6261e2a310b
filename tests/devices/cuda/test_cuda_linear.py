"""linear on the device: float and quantised weights, few tokens and many, against float64."""

import ml_dtypes
import numpy as np
import pytest
from device_arrays import get, poisoned, put
from helpers.builders import normal
from helpers.tolerances import DOT_RTOL, assert_equal_bits

from codellama_rt.model.cuda import ops, quantize
from codellama_rt.ops import Quantized

pytestmark = pytest.mark.usefixtures("cuda")
FEW_AND_MANY = [1, 8, 9, 32, 33, 130]


def assert_near(out, x, weight):
    """Sums in float32, rounded once to the output's dtype."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected = x @ weight.T
    magnitude = np.abs(x) @ np.abs(weight).T
    unit = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}[out.dtype.name]
    error = np.abs(out.astype(np.float64) - expected)
    assert (error <= DOT_RTOL * magnitude + unit * np.abs(expected)).all(), error.max()


@pytest.mark.parametrize("num_tokens", FEW_AND_MANY)
@pytest.mark.parametrize("out_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float_weights(rng, dtype, out_dtype, num_tokens):
    x, weight = normal(rng, (num_tokens, 328), dtype), normal(rng, (150, 328), dtype)
    out_dtype = dtype if out_dtype == "same" else out_dtype
    out = ops.linear(*put(x, weight), out=poisoned((num_tokens, 150), out_dtype))
    assert_near(get(out), x, weight)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_three_weights_as_one(rng, num_tokens):
    x = normal(rng, (num_tokens, 64), "bfloat16")
    weights = [normal(rng, (n, 64), "bfloat16") for n in (40, 7, 130)]
    out = ops.linear(put(x), tuple(put(*weights)), out=poisoned((num_tokens, 177), "float32"))
    assert_near(get(out), x, np.concatenate(weights))


@pytest.mark.parametrize("k", [8, 40, 328, 1024])
def test_a_row_does_not_depend_on_how_many_there_are(rng, k):
    x, weight = normal(rng, (130, k), "bfloat16"), normal(rng, (33, k), "bfloat16")
    weight_there = put(weight)
    many = get(ops.linear(put(x), weight_there, out=poisoned((130, 33), "float32")))
    for count in FEW_AND_MANY[:-1]:
        some = get(ops.linear(put(x[:count]), weight_there, out=poisoned((count, 33), "float32")))
        assert_equal_bits(some, many[:count])


@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_weights(rng, name, dtype, num_tokens):
    x, weight = normal(rng, (num_tokens, 320), dtype), normal(rng, (50, 320))
    payload = quantize.quantize(weight, name)
    on_device = Quantized(put(payload), quantize.FORMATS[name], weight.shape)
    out = get(ops.linear(put(x), on_device, out=poisoned((num_tokens, 50), "float32")))
    stood_for = dequantize(payload, name, weight.shape)
    assert_near(out, normal_bf16(x), stood_for)
    assert_near_weight(stood_for, weight, {"int8": 1 / 127, "int4": 1 / 7}[name])


def dequantize(payload, name, shape):
    """The float32 weight that a payload of formats.cuh stands for."""
    num_values = 1024 if name == "int8" else 512
    tiles, chunks = payload.shape[:2]
    body = np.ascontiguousarray(payload[..., :num_values])
    if name == "int8":
        values = body.view(np.int8).reshape(tiles, chunks, 2, 8, 4, 2, 8)
        values = values.transpose(0, 2, 3, 1, 5, 4, 6)
    else:
        words = body.view(np.uint32).reshape(tiles, chunks, 8, 4, 2, 2)
        shifts = np.array([4 * (e // 2) + 16 * (e % 2) for e in range(8)], np.uint32)
        values = (words[..., None] >> shifts & 15).astype(np.int8) - 8
        values = values.transpose(0, 4, 2, 1, 5, 3, 6)
    scales = np.ascontiguousarray(payload[..., num_values:]).view(np.float16)
    scales = scales.reshape(tiles, chunks, 2, 8, 2).transpose(0, 2, 3, 1, 4)
    weight = values.astype(np.float32) * scales.astype(np.float32)[..., None, None]
    return weight.reshape(tiles * 16, chunks * 64)[: shape[0]]


def normal_bf16(x):
    return x.astype(ml_dtypes.bfloat16)


def assert_near_weight(stood_for, weight, step):
    """Within a step of the group's largest element."""
    groups = np.abs(weight).reshape(len(weight), -1, 32).max(-1).repeat(32, -1)
    assert (np.abs(stood_for - weight) <= step * groups).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantizing_again_changes_nothing(rng, name):
    payload = quantize.quantize(normal(rng, (20, 128)), name)
    again = quantize.quantize(dequantize(payload, name, (20, 128)), name)
    first, second = (dequantize(p, name, (20, 128)) for p in (payload, again))
    np.testing.assert_allclose(second, first, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtypes", "k", "message"),
    [(("float32", "bfloat16"), 64, "must be float16 or bfloat16"),
     (("float16", "bfloat16"), 64, "x must be in the weight's dtype, bfloat16"),
     (("float16", "float16"), 12, "multiples of 16 bytes")],
)  # fmt: skip
def test_refusals(rng, dtypes, k, message):
    x, weight = normal(rng, (2, k), dtypes[0]), normal(rng, (5, k), dtypes[1])
    with pytest.raises(ValueError, match=message):
        ops.linear(*put(x, weight), out=poisoned((2, 5), "float32"))


def test_payload_of_another_size(rng):
    payload = put(quantize.quantize(normal(rng, (16, 64)), "int8"))
    with pytest.raises(ValueError, match="must hold 2176 bytes, got 1088"):
        ops.linear(put(normal(rng, (1, 64), "bfloat16")), Quantized(payload, "int8_mma", (17, 64)))


def test_in_features_that_no_tile_fits():
    with pytest.raises(ValueError, match="multiple of 64, got 96"):
        quantize.quantize(np.ones((4, 96), np.float32), "int8")
