"""The schema against the checks in C++: what the one describes, the other demands.

Every rejected call is made from the schema: valid arguments with one thing wrong. It must name the
op and the argument, and must not have written anything.
"""

import inspect
import re
from collections import Counter

import numpy as np
import pytest
from helpers.arguments import OP_NAMES, SIZES, axis_size, call, make_arguments

from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.schema import OPS

# Where more is allowed than the schema says: direct calls allow these at any stride between rows,
ROWS_MAY_LIE_APART = {
    ("linear", "x"),
    ("linear", "out"),
    ("rope_and_cache", "qkv"),
    *(
        (name, cache)
        for name in ("reshape_and_cache", "rope_and_cache", "copy_blocks")
        for cache in ("key_cache", "value_cache")
    ),
}
# and this in any float dtype; made by the op itself it has the schema's.
ANY_FLOAT = {("linear", "out")}


def tensors_of(op):
    return {**op.inputs, **op.outputs}


def argument_cases():
    return [(name, argument) for name in OP_NAMES for argument in tensors_of(OPS[name])]


def words(axis):
    """The names in an axis; of a constant, none."""
    return set(re.findall("[a-z_]+", axis))


def bound_axis_cases():
    """(op, argument, axis index) of every axis whose size another axis or a constant fixes."""
    cases = []
    for name in OP_NAMES:
        axes = [
            (argument, i, axis)
            for argument, tensor in tensors_of(OPS[name]).items()
            for i, axis in enumerate(tensor.axes)
        ]
        uses = Counter(word for _, _, axis in axes for word in words(axis))
        for argument, i, axis in axes:
            if all(uses[word] > 1 for word in words(axis)):
                cases.append((name, argument, i))
    return cases


def assert_refused(op, arrays, error, names=None):
    """The call fails with a message that begins with the op and names one of `names`."""
    kept = [*op.written, *op.outputs]
    before = {name: arrays[name].tobytes() for name in kept}
    with pytest.raises(error) as caught:
        call(op, arrays)
    message = str(caught.value)
    assert message.startswith(f"{op.name}: "), message
    if names is not None:
        assert any(name in message for name in names), message
    assert type(caught.value) is error, "exactly this class, not a subclass by accident"
    for name in kept:
        assert arrays[name].tobytes() == before[name], f"{name} was written before the refusal"


@pytest.mark.parametrize("name", OP_NAMES)
def test_python_takes_the_arguments_of_the_schema(name):
    op = OPS[name]
    parameters = inspect.signature(getattr(ops, name)).parameters
    assert [p for p in parameters if p in op.inputs] == list(op.inputs)
    others = set(parameters) - set(op.inputs)
    assert others == {*op.attributes, "num_threads"} | ({"out"} if op.outputs else set())


@pytest.mark.parametrize("name", OP_NAMES)
def test_attributes_default_as_in_the_schema(name):
    parameters = inspect.signature(getattr(ops, name)).parameters
    for attribute, description in OPS[name].attributes.items():
        default = parameters[attribute].default
        assert (0.0 if default is None else default) == description.default


@pytest.mark.parametrize("name", OP_NAMES)
def test_arguments_made_from_the_schema_are_accepted(name):
    call(OPS[name], make_arguments(OPS[name]))


@pytest.mark.parametrize("name", OP_NAMES)
def test_costs_are_positive_numbers(name):
    op, arrays = OPS[name], make_arguments(OPS[name])
    sizes = SIZES | {"num_scores": 50}
    item_sizes = {argument: array.itemsize for argument, array in arrays.items()}
    assert op.num_bytes(sizes, item_sizes) > 0
    assert op.flops(sizes) >= 0


@pytest.mark.parametrize(("name", "argument"), argument_cases())
def test_every_dtype_of_the_schema_and_no_other(name, argument):
    op = OPS[name]
    allowed = tensors_of(op)[argument].dtypes
    for dtype in (*FLOAT_DTYPES, "float64", "int32", "int64", "uint8", "bool"):
        arrays = make_arguments(op)
        element = np.dtype(dtype) if dtype not in FLOAT_DTYPES else numpy_dtype(dtype)
        arrays[argument] = np.zeros(arrays[argument].shape, element)
        followers = [n for n, t in tensors_of(op).items() if t.dtypes == f"={argument}"]
        if (name, argument) in ANY_FLOAT:
            accepted = dtype in FLOAT_DTYPES
        elif isinstance(allowed, str):
            accepted = element == arrays[allowed[1:]].dtype
        else:
            accepted = dtype in allowed
            for follower in followers:
                arrays[follower] = arrays[follower].astype(element)
        if not accepted:
            assert_refused(op, arrays, TypeError, [argument, *followers])
        elif element.kind != "i":
            call(op, arrays)


@pytest.mark.parametrize(("name", "argument"), argument_cases())
def test_rank(name, argument):
    op = OPS[name]
    for change in (
        lambda a: a[None],
        lambda a: a[:1].reshape(a.shape[1:]),
        lambda a: a.reshape(-1),
    ):
        arrays = make_arguments(op)
        changed = change(arrays[argument])
        if changed.ndim == arrays[argument].ndim or changed.ndim > 4:
            continue
        arrays[argument] = changed
        assert_refused(op, arrays, ValueError)
        if argument in op.inputs:
            with pytest.raises(ValueError, match=f"^{name}: "):
                call(op, arrays, give_out=False)


@pytest.mark.parametrize(("name", "argument"), argument_cases())
def test_more_dimensions_than_any_op_has(name, argument):
    arrays = make_arguments(OPS[name])
    arrays[argument] = arrays[argument].reshape(1, 1, 1, 1, *arrays[argument].shape)
    with pytest.raises(ValueError, match=r"at most 4 dimensions, got [5-8]"):
        call(OPS[name], arrays)


@pytest.mark.parametrize(("name", "argument", "axis"), bound_axis_cases())
def test_size_of_a_bound_axis(name, argument, axis):
    op = OPS[name]
    for step in (1, -1):
        arrays = make_arguments(op)
        array = arrays[argument]
        shape = list(array.shape)
        shape[axis] += step
        arrays[argument] = np.resize(array, shape)
        axis_words = words(tensors_of(op)[argument].axes[axis])
        sharing = [
            other
            for other, tensor in tensors_of(op).items()
            if any(axis_words & words(its_axis) for its_axis in tensor.axes)
        ]
        assert_refused(op, arrays, ValueError, [argument, *sharing])


@pytest.mark.parametrize(("name", "argument"), argument_cases())
def test_memory_that_is_not_contiguous(name, argument):
    op, arrays = OPS[name], make_arguments(OPS[name])
    array = arrays[argument]
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    arrays[argument] = wide[..., ::2]
    assert_refused(op, arrays, ValueError, [f"{argument} "])


@pytest.mark.parametrize(("name", "argument"), argument_cases())
def test_rows_that_lie_apart(name, argument):
    op, arrays = OPS[name], make_arguments(OPS[name])
    array = arrays[argument]
    if array.ndim == 1:
        pytest.skip("a vector's only axis is tested above")
    wide = np.zeros((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
    wide[..., :-1] = array
    arrays[argument] = wide[..., :-1]
    if (name, argument) in ROWS_MAY_LIE_APART:
        call(op, arrays)
    else:
        assert_refused(op, arrays, ValueError, [f"{argument} "])


@pytest.mark.parametrize(
    ("name", "argument"),
    [(n, a) for n in OP_NAMES for a in (*OPS[n].written, *OPS[n].outputs)],
)
def test_read_only_memory_is_not_written(name, argument):
    op, arrays = OPS[name], make_arguments(OPS[name])
    arrays[argument].flags.writeable = False
    assert_refused(op, arrays, ValueError, [argument])


@pytest.mark.parametrize("name", OP_NAMES)
def test_inputs_may_be_read_only(name):
    op, arrays = OPS[name], make_arguments(OPS[name])
    for argument in set(op.inputs) - set(op.written):
        arrays[argument].flags.writeable = False
    call(op, arrays)


@pytest.mark.parametrize(
    ("constraint", "sizes", "message"),
    [
        ("n_heads % n_kv_heads == 0", {"n_heads": 3}, "n_heads=3 must be a multiple of n_kv_heads"),
        ("block_size % 16 == 0", {"block_size": 24}, "block_size must be a multiple of 16, got 24"),
        ("head_dim % 2 == 0", {"head_dim": 7}, "head_dim must be even, got 7"),
    ],
)
def test_constraints(constraint, sizes, message):
    demanding = [op for op in OPS.values() if constraint in op.constraints]
    assert demanding
    for op in demanding:
        assert axis_size(constraint, SIZES)
        assert not axis_size(constraint, SIZES | sizes)
        assert_refused(op, make_arguments(op, sizes), ValueError, [message])
