"""Graph ops: the direct calls' bits in PyNative and in compiled graphs of any shape."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.arguments import OP_NAMES, call, make_arguments, results
from helpers.builders import running_on
from helpers.tolerances import assert_equal_bits

from codellama_rt import _core, ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.schema import OPS

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
graph = ops.graph
SHAPES = [{"num_tokens": 1, "num_seqs": 1}, {"num_tokens": 17}, {"num_tokens": 40, "num_keys": 60},
          {"num_tokens": 3, "num_pairs": 2, "num_blocks": 9, "max_blocks": 4}]  # fmt: skip
MODES = pytest.mark.parametrize("mode", ["pynative", "jit"])
compilations = []


@mindspore.ops.constexpr(reuse_result=False, check=False)
def note_compilation():
    """A graph evaluates its constants while it is compiled, and never again."""
    compilations.append(1)
    return 0


class Compiled(mindspore.nn.Cell):
    """An op as a graph of its own."""

    def __init__(self, name):
        super().__init__()
        self.run = getattr(graph, name)

    @mindspore.jit
    def construct(self, *tensors):
        note_compilation()
        return self.run(*tensors)


def one_op(name, mode):
    return Compiled(name) if mode == "jit" else getattr(graph, name)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """MindSpore writes a report into the current folder when a graph can't be compiled."""
    monkeypatch.chdir(tmp_path)


def with_dtype(op, arrays, dtype):
    """The arguments that need not be float32 in `dtype`."""
    described = {**op.inputs, **op.outputs}
    return {
        name: array.astype(numpy_dtype(dtype))
        if described[name].dtypes != ("float32",) and array.dtype == np.float32
        else array
        for name, array in arrays.items()
    }


def tensors_of(op, arrays):
    return [mindspore.Tensor.from_numpy(arrays[name]) for name in op.inputs]


def as_bits(array):
    """The array's bits: MindSpore's bfloat16 is not the same NumPy dtype as ml_dtypes'."""
    array = array.asnumpy() if hasattr(array, "asnumpy") else array
    return array.view(f"u{array.itemsize}")


def assert_same_as_direct(op, run, arrays):
    """Results and written arguments of `run` and of the direct call."""
    direct, registered = ({n: a.copy() for n, a in arrays.items()} for _ in range(2))
    expected = results(op, call(op, direct, give_out=False))
    returned = run(*tensors_of(op, registered))
    made = list(returned) if isinstance(returned, tuple) else [returned]
    if op.outputs:
        for ours, theirs in zip(made, expected, strict=True):
            assert_equal_bits(as_bits(ours), as_bits(theirs))
    else:
        assert (made[0].shape, made[0].dtype, int(made[0])) == ((1,), mindspore.int32, 0)
    for name in op.written:
        assert_equal_bits(registered[name], direct[name])


@MODES
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", OP_NAMES)
def test_bits_of_the_direct_road(name, dtype, mode):
    op = OPS[name]
    arrays = with_dtype(op, make_arguments(op), dtype)
    assert_same_as_direct(op, one_op(name, mode), arrays)


@pytest.mark.parametrize("name", OP_NAMES)
def test_one_compilation_for_all_shapes(name):
    op, cell = OPS[name], Compiled(name)
    unknown = [
        mindspore.Tensor(shape=[None] * tensor.ndim, dtype=tensor.dtype)
        for tensor in tensors_of(op, make_arguments(op))
    ]
    cell.set_inputs(*unknown)
    compilations.clear()
    for seed, sizes in enumerate(SHAPES):
        assert_same_as_direct(op, cell, make_arguments(op, sizes, seed))
    assert len(compilations) == 1


@MODES
@pytest.mark.parametrize("num_weights", [1, 2, 3])
def test_linear_takes_one_to_three_weights(num_weights, mode):
    arrays = make_arguments(OPS["linear"])
    x = mindspore.Tensor(arrays["x"])
    rows = [mindspore.Tensor(arrays["weight"][i:].copy()) for i in range(num_weights)]

    @mindspore.jit
    def compiled(x, *weights):
        return graph.linear(x, weights)

    made = compiled(x, *rows) if mode == "jit" else graph.linear(x, tuple(rows))
    expected = ops.linear(arrays["x"], tuple(row.asnumpy() for row in rows))
    assert_equal_bits(made.asnumpy(), expected)


@MODES
@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("rms_norm", {"eps": 0.5}),
        ("add_rms_norm", {"eps": 0.5}),
        ("apply_rotary_pos_emb", {"interleaved": True}),
        ("rope_and_cache", {"interleaved": True}),
        ("flash_attention", {"causal": False, "scale": 0.3}),
        ("paged_attention", {"scale": 0.3}),
        ("decoder_layer", {"eps": 0.5, "interleaved": True}),
    ],
)
def test_attributes(name, attributes, mode):
    op, arrays = OPS[name], make_arguments(OPS[name])
    run, names = graph.primitive(name, **attributes), [*op.written, "out", "query", "lse"]

    @mindspore.jit
    def compiled(*tensors):
        return run(*tensors)

    direct = {n: a.copy() for n, a in arrays.items()}
    call(op, direct, **attributes)
    made = (compiled if mode == "jit" else run)(*tensors_of(op, arrays))
    made = made if isinstance(made, tuple) else (made,)
    results = [tensor.asnumpy() for tensor in made]  # the token, too: PyNative is asynchronous
    arrays |= dict(zip(op.outputs, results, strict=False))
    for argument in set(names) & arrays.keys():
        assert_equal_bits(arrays[argument], direct[argument])
    changed = {n: a.copy() for n, a in make_arguments(op).items()}
    call(op, changed)
    assert any((changed[n] != direct[n]).any() for n in set(names) & arrays.keys())


@pytest.mark.parametrize("isa", ops.available_isas())
def test_both_roads_share_instruction_set_and_threads(isa):
    """The library is loaded once: what Python chooses holds for MindSpore's calls."""
    op = OPS["linear"]
    arrays = with_dtype(op, make_arguments(op, {"num_tokens": 9, "in_features": 333}), "bfloat16")
    arrays["x"] = make_arguments(op, {"num_tokens": 9, "in_features": 333})["x"]
    cell = Compiled("linear")
    for num_threads in (1, 2):
        with running_on(isa, num_threads):
            assert_same_as_direct(op, cell, arrays)


@pytest.mark.parametrize("name", OP_NAMES)
def test_python_takes_the_arguments_of_the_direct_road(name):
    direct = inspect.signature(getattr(ops, name)).parameters
    registered = inspect.signature(getattr(graph, name)).parameters
    taken = [p for p in direct.values() if p.name not in ("out", "num_threads")]
    expected = [(p.name, p.kind, p.default) for p in taken]
    assert [(p.name, p.kind, p.default) for p in registered.values()] == expected
    text = inspect.getdoc(getattr(graph, name))
    assert all(f"    {parameter}: " in text for parameter in registered)


def test_a_primitive_is_made_once():
    assert graph.primitive("rms_norm") is graph.primitive("rms_norm", eps=1e-5)
    assert graph.primitive("rms_norm") is not graph.primitive("rms_norm", eps=1e-6)
    assert graph.primitive("linear", num_weights=2) is not graph.primitive("linear")


def test_ops_alone_do_not_import_mindspore():
    code = "import sys, codellama_rt.ops; sys.exit('mindspore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'graf'"):
        _ = ops.graf


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_the_library_needs_no_symbol_of_mindspore_or_python():
    library = Path(_core.__file__).with_name("libcodellama_rt_cpu.so")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    )
    assert "mindspore" not in listing.stdout.lower()
    assert not [line for line in listing.stdout.splitlines() if line.split()[-1].startswith("Py")]
