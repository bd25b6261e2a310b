"""`ops.Custom`'s contract on Ascend: MindSpore's own callback over the package's own headers.

MindSpore is told that its device is an NPU and where CANN's package is, whose headers are those
that op_host's definitions give. Its generated callback is compiled and called as MindSpore calls
it; what is missing from a run on an NPU is MindSpore's stream.
"""

import ctypes
import inspect
from ctypes import byref, c_char_p, c_double, c_int64, c_uint64, c_void_p

import numpy as np
import pytest
from aclnn import Aclnn
from helpers.builders import int32, normal, paged, rope_tables
from helpers.tolerances import assert_equal_bits

from codellama_rt.model.ascend import ops as ascend

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")
from codellama_rt.model.ascend import graph as ascend_graph  # noqa: E402  after MindSpore is known to be there

OPS = ("rms_norm", "add_rms_norm", "silu_and_mul", "rope_and_cache", "paged_attention")


@pytest.fixture
def npu(library, tmp_path, monkeypatch):
    """MindSpore's device is "Ascend", and CANN's package is installed."""
    from mindspore.ops.operations import custom_ops

    library.library.clrt_emu_header.restype = c_char_p
    headers = tmp_path / "vendor" / "op_api" / "include"
    headers.mkdir(parents=True)
    for name in OPS:
        declared = library.library.clrt_emu_header(ascend_graph.aclnn_name(name)[5:].encode())
        (headers / f"aclnn_clrt_{name}.h").write_bytes(declared)
    (tmp_path / "include" / "acl").mkdir(parents=True)
    (tmp_path / "include" / "acl" / "acl_base.h").write_text("#include <cstdint>\n")
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", str(tmp_path / "vendor"))
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path / "opp"))
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", str(tmp_path / "cache"))
    real = mindspore.get_context
    for owner in (mindspore, custom_ops.context):
        monkeypatch.setattr(
            owner, "get_context", lambda key: "Ascend" if key == "device_target" else real(key)
        )
    monkeypatch.setattr(custom_ops.Custom, "compiled_bin", [])
    ascend_graph.primitive.cache_clear()
    yield
    ascend_graph.primitive.cache_clear()


@pytest.fixture
def run(ascend_build, aclnn, npu):
    """run(primitive, arguments, outputs): both phases, the first through MindSpore's callback."""
    caller = ctypes.CDLL(str(ascend_build / "libclrt_aclnn_callback.so"))

    def run(primitive, arguments, outputs):
        path, function = primitive.get_attr_dict()["custom_callback_func"].split(":")
        callback = getattr(ctypes.CDLL(path), f"{function}GetWorkSpaceSize")
        plan = getattr(aclnn.library, f"{function}GetWorkspaceSize")
        given = [as_pointers(aclnn, values) for values in (arguments, outputs)]
        size, executor = c_uint64(), c_void_p()
        code = caller.call_back(
            callback, plan, given[0], c_int64(len(arguments)), given[1], c_int64(len(outputs)),
            byref(size), byref(executor),
        )  # fmt: skip
        assert code == 0, aclnn.library.clrt_emu_last_error()
        workspace = np.zeros(max(size.value, 1), np.uint8)
        memory = c_void_p(workspace.ctypes.data if size.value else None)
        assert getattr(aclnn.library, function)(memory, size, executor, None) == 0

    return run


def as_pointers(aclnn: Aclnn, values):
    """What MindSpore hands a callback: aclTensor and aclIntArray, and addresses of numbers."""
    numbers = [c_double(value) if isinstance(value, float) else None for value in values]
    pointers = (c_void_p * len(values))(*(
        aclnn.make(value).value if number is None else ctypes.addressof(number)
        for value, number in zip(values, numbers, strict=True)
    ))  # fmt: skip
    pointers.numbers = numbers  # they live as long as their addresses
    return pointers


def cases(rng):
    """(op, arguments, outputs, what the same kernel gives directly)."""
    x, residual = (normal(rng, (5, 96), "bfloat16") for _ in range(2))
    weight = normal(rng, 96, "bfloat16")
    yield "rms_norm", (x, weight, 1e-6), [x]
    yield "add_rms_norm", (x, residual, weight, 1e-6), [x, x]
    yield "silu_and_mul", (x,), [x[:, :48]]
    attended = paged(rng, [70, 1500, 5], [3, 1, 1], heads=(4, 2), block_size=128, head_dim=32,
                     dtype="float16", cache_dtype="float16")  # fmt: skip
    qkv = normal(rng, (3, 8 * 32), "float16")
    caches = [normal(rng, (2, 2, 128, 32), "float16") for _ in range(2)]
    yield "rope_and_cache", (
        qkv, *rope_tables(50, 32), int32([3, 49, 0]), *caches, int32([200, -1, 5])
    ), [qkv[:, : 4 * 32].reshape(3, 4, 32)]  # fmt: skip
    query, *tensors, lens, ends = attended.arguments
    lse = np.empty(query.shape[:2], np.float32)
    yield "paged_attention", (query, *tensors, lens.tolist(), ends.tolist(), 0.2), [query, lse]


@pytest.mark.parametrize("i", range(len(OPS)), ids=OPS)
def test_a_custom_primitive_calls_the_kernel(aclnn, run, rng, i):
    name, arguments, like = list(cases(rng))[i]
    assert name == OPS[i]
    copies = list(cases(np.random.default_rng(20230824)))[i][1]  # the same, for what is written
    expected = directly(aclnn, name, copies)
    outputs = [np.zeros_like(array) for array in like]
    run(ascend_graph.primitive(name), arguments, outputs)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_equal_bits(actual, wanted)
    for ours, theirs in zip(arguments, copies, strict=True):
        if isinstance(ours, np.ndarray):
            assert_equal_bits(ours, theirs)


def directly(aclnn, name, arguments):
    if name == "paged_attention":
        *tensors, lens, ends, scale = arguments
        return aclnn.paged_attention(*tensors, int32(lens), int32(ends), scale=scale)
    result = getattr(aclnn, name)(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("i", range(len(OPS)), ids=OPS)
@pytest.mark.usefixtures("npu")
def test_shapes_and_dtypes_are_inferred(rng, i):
    name, arguments, like = list(cases(rng))[i]
    primitive = ascend_graph.primitive(name)
    shapes = primitive.out_shape(*(np.shape(a) for a in arguments))
    dtypes = primitive.out_dtype(*(getattr(a, "dtype", None) for a in arguments))
    several = len(like) > 1
    assert (shapes if several else (shapes,)) == tuple(array.shape for array in like)
    for dtype, array in zip(dtypes if several else (dtypes,), like, strict=True):
        assert str(dtype).lower() == array.dtype.name
    assert primitive.multi_output == several


def test_the_functions_hand_their_arguments_over_in_order(monkeypatch):
    calls = {}
    monkeypatch.setattr(
        ascend_graph, "primitive", lambda name: lambda *given: calls.update({name: given})
    )
    for name in OPS:
        ours, theirs = getattr(ascend_graph, name), getattr(ascend, name)
        parameters = inspect.signature(ours).parameters
        assert list(parameters) == list(inspect.signature(theirs).parameters)
        tensors = [f"{key}" for key, p in parameters.items() if p.default is p.empty]
        ours(*tensors, **({"scale": 0.5} if name == "paged_attention" else {}))
    assert calls["rms_norm"] == ("x", "weight", 1e-5)
    assert calls["add_rms_norm"] == ("x", "residual", "weight", 1e-5)
    assert calls["silu_and_mul"] == ("gate_up",)
    assert calls["rope_and_cache"] == (
        "qkv", "cos", "sin", "positions", "key_cache", "value_cache", "slot_mapping"
    )  # fmt: skip
    assert calls["paged_attention"] == (
        "query", "key_cache", "value_cache", "block_tables", tuple("seq_lens"),
        tuple("cu_seqlens_q"), 0.5,
    )  # fmt: skip


def test_without_an_npu_it_says_so():
    ascend_graph.primitive.cache_clear()
    with pytest.raises(RuntimeError, match="need MindSpore on an NPU, but its device is CPU"):
        ascend_graph.rms_norm(None, None)
    with pytest.raises(ValueError, match="no Ascend op named 'reshape_and_cache'; available: rms"):
        ascend_graph.primitive("reshape_and_cache")
    with pytest.raises(ValueError, match="halves, not interleaved"):
        ascend_graph.rope_and_cache(*[None] * 7, interleaved=True)
