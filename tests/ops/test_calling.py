"""What all ops have in common: results given or made, nothing to do, MindSpore Tensors, threads."""

import numpy as np
import pytest
from helpers.arguments import EMPTY, OP_NAMES, SIZES, call, make_arguments, results, shape_of
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.schema import OPS

WITH_OUTPUTS = [name for name in OP_NAMES if OPS[name].outputs]


def outcome(op, arrays, **how):
    """Results and written arguments of a call on copies of `arrays`."""
    copies = {name: array.copy() for name, array in arrays.items()}
    returned = results(op, call(op, copies, **how))
    return [*returned, *(copies[name] for name in op.written)]


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_results_given_or_made(name):
    op, arrays = OPS[name], make_arguments(OPS[name])
    made, given = outcome(op, arrays, give_out=False), outcome(op, arrays)
    for ours, theirs in zip(made, given, strict=True):
        assert_equal_bits(ours, theirs)
    returned = results(op, call(op, arrays))
    assert all(a is arrays[n] for a, n in zip(returned, op.outputs, strict=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_dtype_of_results_that_are_made(name, dtype):
    op, arrays = OPS[name], make_arguments(OPS[name])
    first = next(n for n, t in op.inputs.items() if t.dtypes[:3] == FLOAT_DTYPES)
    for argument, tensor in op.inputs.items():
        if argument == first or tensor.dtypes == f"={first}":
            arrays[argument] = arrays[argument].astype(numpy_dtype(dtype))
    made = results(op, call(op, arrays, give_out=False))
    for result, (argument, tensor) in zip(made, op.outputs.items(), strict=True):
        follows = tensor.dtypes == f"={first}"
        assert result.dtype == numpy_dtype(dtype if follows else "float32"), argument
        assert result.shape == shape_of(tensor, SIZES)


@pytest.mark.parametrize("sizes", [EMPTY, EMPTY | {"num_seqs": 0, "num_positions": 0}])
@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.usefixtures("isa")
def test_nothing_to_do(name, sizes):
    op = OPS[name]
    arrays = make_arguments(op, sizes)
    before = {argument: arrays[argument].copy() for argument in op.written}
    for give_out in (True, False):
        made = results(op, call(op, arrays, give_out=give_out))
        for result, tensor in zip(made, op.outputs.values(), strict=True):
            assert result.shape == shape_of(tensor, SIZES | sizes)
    for argument, array in before.items():
        assert_equal_bits(arrays[argument], array)


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.usefixtures("isa")
def test_threads_change_no_bit(name, threads):
    sizes = {"num_tokens": 300, "num_positions": 300, "num_blocks": 40, "max_blocks": 20,
             "num_keys": 500, "dim": 260, "hidden_dim": 300, "in_features": 260,
             "out_features": 200}  # fmt: skip
    op = OPS[name]
    arrays = make_arguments(op, sizes)
    if "seq_lens" in arrays:
        arrays["seq_lens"][...] = [320, 170]
    threads(1)
    expected = outcome(op, arrays)
    for count in (2, 5):
        threads(count)
        for ours, theirs in zip(outcome(op, arrays), expected, strict=True):
            assert_equal_bits(ours, theirs)


@pytest.mark.parametrize("name", OP_NAMES)
def test_a_limit_of_threads_changes_no_bit(name, threads):
    op, arrays = OPS[name], make_arguments(OPS[name], {"num_tokens": 300, "num_positions": 300,
                                                       "num_blocks": 40, "max_blocks": 20,
                                                       "num_keys": 500})  # fmt: skip
    if "seq_lens" in arrays:
        arrays["seq_lens"][...] = [320, 170]
    threads(4)
    expected = outcome(op, arrays)
    for limit in (1, 3, 4, 100, 2**40):
        for ours, theirs in zip(outcome(op, arrays, num_threads=limit), expected, strict=True):
            assert_equal_bits(ours, theirs)
    assert ops.num_threads() == 4


@pytest.mark.parametrize("name", OP_NAMES)
def test_a_limit_of_threads_that_cannot_be(name):
    op, arrays = OPS[name], make_arguments(OPS[name])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"num_threads must be at least 1, got {limit}"):
            call(op, arrays, num_threads=limit)
    with pytest.raises(TypeError):
        call(op, arrays, num_threads=2.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OP_NAMES)
def test_mindspore_tensors(name, dtype):
    """Tensors that share the arrays' memory: the same bits, in place, and results of their kind."""
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
    op, arrays = OPS[name], make_arguments(OPS[name])
    for argument, tensor in {**op.inputs, **op.outputs}.items():
        if tensor.dtypes != ("float32",) and arrays[argument].dtype == np.float32:
            arrays[argument] = arrays[argument].astype(numpy_dtype(dtype))
    expected = outcome(op, arrays)
    tensors = {name: mindspore.Tensor.from_numpy(array) for name, array in arrays.items()}
    given = {name: tensor.copy() for name, tensor in tensors.items()}
    for made in (results(op, call(op, tensors, give_out=False)), results(op, call(op, given))):
        assert all(isinstance(result, mindspore.Tensor) for result in made)
        for result, argument, array in zip(made, op.outputs, expected, strict=False):
            if argument != "out" or name != "embedding":  # made in float32, given in `dtype`
                assert_equal_bits(as_bits(result), as_bits(array))
    for argument, array in zip(op.written, expected[len(op.outputs) :], strict=True):
        assert_equal_bits(arrays[argument], array)
        assert_equal_bits(as_bits(given[argument]), as_bits(array))


def as_bits(array):
    """The array's bits: MindSpore's bfloat16 is not the same NumPy dtype as ml_dtypes'."""
    array = array.asnumpy() if hasattr(array, "asnumpy") else array
    return array.view(f"u{array.itemsize}")


def test_an_argument_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"tensors with DLPack \(__dlpack__\), got list"):
        ops.rms_norm([[1.0]], np.ones(1, np.float32))


def test_swapped_bytes_are_not_taken_for_numbers():
    x = np.ones((2, 4), ">f4")
    with pytest.raises(TypeError, match="rms_norm: x must be float32"):
        ops.rms_norm(x, np.ones(4, np.float32), out=np.zeros((2, 4), np.float32))
