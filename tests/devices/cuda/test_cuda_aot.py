"""The symbols of MindSpore's AOT ABI on the device, called as MindSpore would, without it."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from device_arrays import get, poisoned, put
from helpers.builders import ends, int32, normal, paged
from helpers.tolerances import assert_equal_bits

from codellama_rt.model.cuda import ops
from codellama_rt.ops import native


class AotOp:
    """int f(count, data, ndims, shapes, dtypes, stream, extra)."""

    def __init__(self, library, name):
        self.library, self.function = library, getattr(library, f"clrt_{name}")

    def __call__(self, *tensors):
        count = len(tensors)
        shapes = [(ctypes.c_int64 * len(t.shape))(*t.shape) for t in tensors]
        pointers = (ctypes.POINTER(ctypes.c_int64) * count)(
            *[ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes]
        )
        return self.function(
            count,
            (ctypes.c_void_p * count)(*[t.device_ptr for t in tensors]),
            (ctypes.c_int * count)(*[len(t.shape) for t in tensors]),
            pointers,
            (ctypes.c_char_p * count)(*[t.dtype.encode() for t in tensors]),
            ctypes.c_void_p(native.cuda().stream()),
            None,
        )

    def error(self):
        self.library.clrt_cuda_last_error.restype = ctypes.c_char_p
        return self.library.clrt_cuda_last_error().decode()


@pytest.fixture
def library(cuda):
    """The library beside the module that the tests use."""
    (path,) = Path(cuda.__file__).parent.glob("libcodellama_rt_cuda*.so")
    return ctypes.CDLL(str(path))


def test_rms_norm(library, rng):
    x, weight = put(normal(rng, (3, 64), "bfloat16"), normal(rng, (64,), "bfloat16"))
    out = poisoned((3, 64), "bfloat16")
    assert AotOp(library, "rms_norm")(x, weight, out) == 0
    assert_equal_bits(get(out), get(ops.rms_norm(x, weight)))


def test_paged_attention(library, rng):
    case = paged(
        rng, [300, 20], [1, 20], heads=(4, 2), head_dim=128, dtype="bfloat16",
        cache_dtype="bfloat16",
    )  # fmt: skip
    arguments = put(*case.arguments)
    out = poisoned(case.query.shape, "bfloat16"), poisoned(case.query.shape[:2], "float32")
    assert AotOp(library, "paged_attention")(*arguments, *out) == 0
    for got, expected in zip(get(*out), get(*ops.paged_attention(*arguments)), strict=True):
        assert_equal_bits(got, expected)


def test_an_op_in_place_returns_its_token(library, rng):
    caches = put(*[np.zeros((2, 1, 16, 64), np.float32)] * 2)
    slots, token = put(int32([3]), int32([7]))
    op = AotOp(library, "reshape_and_cache")
    key = put(normal(rng, (1, 1, 64)))
    assert op(key, key, *caches, slots, token) == 0
    assert get(token).tolist() == [0]
    assert_equal_bits(get(caches[1])[0, 0, 3], get(key)[0, 0])


def test_several_weights(library, rng):
    x = put(normal(rng, (2, 64), "bfloat16"))
    weights = put(*[normal(rng, (n, 64), "bfloat16") for n in (5, 20)])
    out = poisoned((2, 25), "bfloat16")
    assert AotOp(library, "linear")(x, *weights, out) == 0
    assert_equal_bits(get(out), get(ops.linear(x, tuple(weights))))


def test_a_refusal_is_a_number_and_a_text(library, rng):
    x = put(normal(rng, (2, 64)))
    op = AotOp(library, "rms_norm")
    assert op(x, put(normal(rng, (63,))), x) == 1
    assert op.error().startswith("rms_norm: weight must be")


def test_flash_attention_is_causal_by_default(library, rng):
    x = put(normal(rng, (5, 2, 64), "float16"))
    bounds = put(ends([2, 3]))
    out = poisoned((5, 2, 64), "float16"), poisoned((5, 2), "float32")
    assert AotOp(library, "flash_attention")(x, x, x, bounds, bounds, *out) == 0
    assert_equal_bits(get(out[0]), get(ops.flash_attention(x, x, x, bounds, bounds)[0]))
