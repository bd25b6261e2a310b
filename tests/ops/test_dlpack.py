"""Tensors by DLPack: capsules of both versions in, NumPy arrays and capsules out."""

import gc
import weakref

import numpy as np
import pytest
from helpers.arguments import OP_NAMES, call, make_arguments, results
from helpers.tolerances import assert_equal_bits

from codellama_rt import _core, ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import Quantized
from codellama_rt.ops.schema import OPS

WITH_OUTPUTS = [name for name in OP_NAMES if OPS[name].outputs]


class Producer:
    """Another framework's tensor: it knows DLPack, and nothing of NumPy."""

    def __init__(self, array, *, versioned=True, device=(1, 0)):
        self._array, self.versioned, self.device, self.exports = array, versioned, device, 0

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **version):
        if version and not self.versioned:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.exports += 1
        return _core.dlpack_capsule(self._array, bool(version))


class Old(Producer):
    """As NumPy 1 exports: `stream` is the only argument."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__()


def as_producers(arrays, make=Producer):
    return {name: make(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.parametrize("make", [Producer, lambda array: Producer(array, versioned=False), Old])
def test_every_argument(name, make):
    """All arguments by DLPack, results among them: the same bits, written in place."""
    op, arrays = OPS[name], make_arguments(OPS[name])
    expected = {argument: array.copy() for argument, array in arrays.items()}
    call(op, expected)
    given = as_producers(arrays, make)
    returned = results(op, call(op, given))
    assert all(a is given[n] for a, n in zip(returned, op.outputs, strict=True))
    for argument, array in arrays.items():
        assert_equal_bits(array, expected[argument])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_results_that_are_made_are_numpy_arrays(name, dtype):
    op, arrays = OPS[name], make_arguments(OPS[name])
    first = next((n for n, t in op.inputs.items() if t.dtypes[:3] == FLOAT_DTYPES), None)
    for argument, tensor in op.inputs.items():
        if first and (argument == first or tensor.dtypes == f"={first}"):
            arrays[argument] = arrays[argument].astype(numpy_dtype(dtype))
    copies = {argument: array.copy() for argument, array in arrays.items()}
    ours = results(op, call(op, as_producers(arrays), give_out=False))
    theirs = results(op, call(op, copies, give_out=False))
    for result, expected in zip(ours, theirs, strict=True):
        assert isinstance(result, np.ndarray)
        assert_equal_bits(result, expected)


def test_views_keep_their_strides():
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    weight = np.eye(3, dtype=np.float32)
    given = Producer(wide[1:, :3])
    assert_equal_bits(ops.linear(given, Producer(weight)), ops.linear(wide[1:, :3], weight))
    with pytest.raises(ValueError, match=r"x float32 \(4, 3\) must be contiguous within its rows"):
        ops.linear(Producer(wide[:, ::2]), weight)


def test_a_quantised_payload():
    x, weight = np.ones((2, 64), np.float32), np.ones((3, 64), np.float32)
    quantized = ops.quantize(weight, "int8")
    given = Quantized(Producer(quantized.payload), "int8", quantized.shape)
    assert_equal_bits(ops.linear(x, given, out=np.zeros((2, 3), np.float32)),
                      ops.linear(x, quantized))  # fmt: skip


def test_bfloat16_there_and_back():
    x = np.arange(8).reshape(2, 4).astype(numpy_dtype("bfloat16"))
    assert_equal_bits(ops.silu_and_mul(ops.as_dlpack(x)), ops.silu_and_mul(x))
    assert _core.shape_and_dtype(ops.as_dlpack(x)) == ((2, 4), "bfloat16")


# ---- what is refused ---------------------------------------------------------------------------


def test_a_device_is_refused_before_anything_is_exported():
    given = Producer(np.ones((2, 4), np.float32), device=(2, 0))
    with pytest.raises(RuntimeError, match=r"got .*Producer on DLPack's device type 2; copy it to"):
        ops.silu_and_mul(given)
    assert given.exports == 0


def test_read_only_memory_is_read_and_not_written():
    x = np.ones((2, 4), np.float32)
    x.flags.writeable = False
    weight = np.ones(4, np.float32)
    expected = ops.rms_norm(x, weight)
    assert_equal_bits(ops.rms_norm(Producer(x), weight), expected)
    with pytest.raises(ValueError, match="rms_norm: out is written in place and must not be read"):
        ops.rms_norm(x, weight, out=Producer(x))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8, np.int8])
def test_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"gate_up must be float32.* got {np.dtype(dtype).name} "):
        ops.silu_and_mul(Producer(np.ones((2, 4), dtype)))


def test_too_many_axes():
    with pytest.raises(ValueError, match="at most 4 dimensions, got 5"):
        ops.silu_and_mul(Producer(np.ones((1, 1, 1, 2, 4), np.float32)))


def test_what_only_says_that_it_has_dlpack():
    class Liar(Producer):
        def __dlpack__(self, **version):
            return 3

    with pytest.raises(TypeError, match="Liar gives no DLPack capsule"):
        ops.silu_and_mul(Liar(None))


def test_an_error_of_the_producer_comes_through():
    class Grad(Producer):
        def __dlpack__(self, **version):
            raise BufferError("this one requires grad")

    with pytest.raises(BufferError, match="this one requires grad"):
        ops.silu_and_mul(Grad(None))


# ---- memory ------------------------------------------------------------------------------------


class Tracked(np.ndarray):
    """An array that can be weakly referenced."""


@pytest.mark.parametrize("versioned", [True, False])
def test_capsules_give_their_memory_back(versioned):
    array = np.ones((2, 4), np.float32).view(Tracked)
    gone = weakref.ref(array)
    ops.silu_and_mul(Producer(array, versioned=versioned))
    unused = _core.dlpack_capsule(array, versioned)
    del array
    gc.collect()
    assert gone() is not None
    del unused
    gc.collect()
    assert gone() is None


def test_what_numpy_takes_lives_as_long_as_its_view():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).view(Tracked)
    gone = weakref.ref(array)
    view = np.from_dlpack(ops.as_dlpack(array.T))
    del array
    gc.collect()
    np.testing.assert_array_equal(view, [[0, 3], [1, 4], [2, 5]])
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_as_dlpack_refuses_what_it_cannot_share():
    with pytest.raises(TypeError, match="as_dlpack takes a NumPy array, got list"):
        ops.as_dlpack([1])
    exported = ops.as_dlpack(np.ones(2, np.float32))
    with pytest.raises(BufferError, match=r"on the CPU, not on DLPack's device \(2, 0\)"):
        exported.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="no dtype for complex64"):
        ops.as_dlpack(np.ones(2, np.complex64)).__dlpack__()
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(BufferError, match="read-only array needs version 1"):
        ops.as_dlpack(frozen).__dlpack__()
    assert "versioned" in repr(ops.as_dlpack(frozen).__dlpack__(max_version=(1, 0)))
    assert "versioned" not in repr(exported.__dlpack__(max_version=(0, 8)))


def test_torch_in_and_out():
    torch = pytest.importorskip("torch", reason="this project does not depend on PyTorch")
    x = torch.randn(3, 8).to(torch.bfloat16)
    made = torch.from_dlpack(ops.as_dlpack(ops.silu_and_mul(x)))
    given = torch.empty(3, 4, dtype=torch.bfloat16)
    assert ops.silu_and_mul(x, out=given) is given
    assert torch.equal(made, given)
    expected = torch.nn.functional.silu(x[:, :4].float()) * x[:, 4:].float()
    assert torch.allclose(made.float(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(BufferError, match="require"):
        ops.silu_and_mul(torch.ones(1, 4, requires_grad=True))
