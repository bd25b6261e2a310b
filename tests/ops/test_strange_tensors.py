"""Tensors that no kernel may see: sizes past 64 bits, odd addresses, other frameworks' memory."""

import types

import numpy as np
import pytest
from helpers.arguments import OP_NAMES, call, make_arguments
from helpers.builders import int32

from codellama_rt import ops
from codellama_rt.ops.quantized import MAX_ELEMENTS, Quantized
from codellama_rt.ops.schema import OPS

ARGUMENTS = [(name, a) for name in OP_NAMES for a in (*OPS[name].inputs, *OPS[name].outputs)]


def unaligned(array):
    """A copy that begins at an odd address."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    copy = memory[memory.ctypes.data % 2 ^ 1 :][: array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_odd_address_is_refused(name, argument):
    arrays = make_arguments(OPS[name])
    arrays[argument] = unaligned(arrays[argument])
    assert not arrays[argument].flags.aligned
    before = {written: arrays[written].copy() for written in OPS[name].written}
    with pytest.raises(ValueError, match=rf"{name}: \w+ .* must lie at a multiple of 4 bytes"):
        call(OPS[name], arrays)
    for written, array in before.items():
        np.testing.assert_array_equal(arrays[written], array)


def test_half_precision_lies_at_even_addresses():
    x = np.ones((3, 4), np.float16)
    with pytest.raises(ValueError, match=r"gate_up .* must lie at a multiple of 2 bytes"):
        ops.silu_and_mul(unaligned(x))
    memory = np.zeros(x.nbytes + 2, np.uint8)
    aligned = memory[2:].view(np.float16).reshape(x.shape)  # not at a multiple of 4
    assert ops.silu_and_mul(aligned).shape == (3, 2)


def test_a_tensor_without_elements_lies_anywhere():
    x = unaligned(np.ones((1, 4), np.float32))[:0]
    assert ops.rms_norm(x, np.ones(4, np.float32)).shape == (0, 4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_bytes_may_lie_anywhere(dtype):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((5, 64), np.float32), rng.standard_normal((33, 64), np.float32)
    quantized = ops.quantize(weight, dtype)
    moved = Quantized(unaligned(quantized.payload), dtype, quantized.shape)
    np.testing.assert_array_equal(ops.linear(x, moved), ops.linear(x, quantized))


# ---- sizes -------------------------------------------------------------------------------------

HUGE_CACHES = [
    (2**58 + 2, 1, 16, 128),
    (2**62, 4, 16, 128),
    (2**64 + 2, 1, 16, 128),
    (2, 2**62 + 1, 16, 128),
    (2, 1, 2**60, 128),
    (2, 1, 16, 2**61),
    (-2, -1, 16, 128),
    (2, 1, -16, 128),
    (0, 2**63, 16, 128),
    (0, 2**30, 2**30, 128),
]
HUGE_WEIGHTS = [
    (2**40, 2**24),
    (2**63, 64),
    (2**64 + 2, 64),
    (-2, 64),
    (2, -(2**40)),
    (2**56 + 2, 256),
    (0, 2**62),
    (2**49, 1),
]


def as_given(payload, dtype, shape):
    """What ops see as a Quantized, without its own check."""
    return types.SimpleNamespace(payload=payload, dtype=dtype, shape=shape, nbytes=payload.nbytes)


@pytest.mark.parametrize("shape", [*HUGE_CACHES, *HUGE_WEIGHTS])
def test_a_quantized_has_sizes_that_memory_can_hold(shape):
    with pytest.raises(ValueError, match=r"no size below 0 and at most 2\*\*48 elements, got \("):
        Quantized(np.zeros(2 * 2112, np.uint8), "int8", shape)


@pytest.mark.parametrize("shape", [(2.0, 64), ("2", 64), (None, 64), 5, None])
def test_sizes_are_integers(shape):
    with pytest.raises(TypeError, match="shape must be a tuple of integers, got"):
        Quantized(np.zeros(8, np.uint8), "int8", shape)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", HUGE_CACHES)
def test_a_huge_cache_is_refused_by_every_op(shape, dtype):
    caches = [as_given(np.zeros(2 * 2112, np.uint8), dtype, shape) for _ in range(2)]
    x, slot = np.ones((1, 1, 128), np.float32), int32([2**31 - 16])
    tables = np.zeros((1, 1), np.int32), int32([1]), int32([0, 1])
    cos = np.ones((1, 64), np.float32)
    out = np.zeros((1, 128), np.float32)
    layer = make_arguments(OPS["decoder_layer"])
    layer |= {"key_cache": caches[0], "value_cache": caches[1]}
    refused = pytest.raises(ValueError, match="has a size below 0, or more than 2\\^48 elements")
    with refused:
        ops.reshape_and_cache(x, x, *caches, slot)
    with refused:
        ops.copy_blocks(*caches, int32([[0, 1]]))
    with refused:
        ops.paged_attention(x, *caches, *tables, out=(x, out[:, :1]))
    with refused:
        qkv = np.ones((1, 384), np.float32)
        ops.rope_and_cache(qkv, cos, cos, int32([0]), *caches, slot, out=x)
    with refused:
        call(OPS["decoder_layer"], layer)


@pytest.mark.parametrize("dtype", ["int8", "int4", "q4_0", "q8_0", "q6_k"])
@pytest.mark.parametrize("shape", HUGE_WEIGHTS)
def test_a_huge_weight_is_refused_by_every_op(shape, dtype):
    weight = as_given(np.zeros(4096, np.uint8), dtype, shape)
    refused = pytest.raises(ValueError, match="has a size below 0, or more than 2\\^48 elements")
    x = np.ones((1, 64), np.float32)
    with refused:
        ops.linear(x, weight, out=x)
    with refused:
        ops.embedding(int32([0]), weight, out=x)


def test_a_shape_that_the_payload_cannot_hold_allocates_nothing():
    weight = Quantized(np.zeros(4096, np.uint8), "int8", (2**42, 64))
    with pytest.raises(ValueError, match=r"linear: weight int8 .* must hold .* bytes, got 4096"):
        ops.linear(np.ones((1, 64), np.float32), weight)


@pytest.mark.parametrize("shape", [(0, MAX_ELEMENTS * 2, 4), (MAX_ELEMENTS * 2, 0, 4)])
def test_an_array_without_elements_has_such_sizes_as_well(shape):
    x = np.zeros(shape, np.float32)
    cos = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"query .* more than 2\^48 elements"):
        ops.apply_rotary_pos_emb(x, x, cos, cos, int32([]))


def test_items_without_bytes():
    with pytest.raises(TypeError, match="rms_norm: x must be float32"):
        ops.rms_norm(np.zeros((2, 4), []), np.ones(4, np.float32), out=np.zeros((2, 4), np.float32))


# ---- other frameworks ---------------------------------------------------------------------------


class Tensor:
    """Looks like a torch.Tensor without DLPack; its pointer may be a device's."""

    __module__ = "torch"
    dtype = "torch.float32"
    nbytes = 64

    def __init__(self, shape):
        self.shape = shape

    def data_ptr(self):
        raise AssertionError("the memory of another framework's tensor was touched")

    def is_contiguous(self):
        return True


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize("give_out", [True, False])
def test_tensors_of_other_frameworks_are_refused_in_words(name, argument, give_out):
    op, arrays = OPS[name], make_arguments(OPS[name])
    if argument in op.outputs and not give_out:
        return
    arrays[argument] = Tensor(arrays[argument].shape)
    with pytest.raises(TypeError) as caught:
        call(op, arrays, give_out=give_out)
    assert str(caught.value) == (
        "an op takes NumPy arrays, MindSpore Tensors or tensors with DLPack (__dlpack__), "
        "got torch.Tensor; pass a NumPy array that shares its memory"
    )


def test_a_payload_of_another_framework():
    weight = Quantized(Tensor((1056,)), "int8", (2, 2))
    with pytest.raises(TypeError, match=r"payload of a Quantized must be .*, got torch.Tensor"):
        ops.linear(np.ones((1, 2), np.float32), weight)
