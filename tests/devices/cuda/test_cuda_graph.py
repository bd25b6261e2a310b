"""The registered CUDA ops, as far as a MindSpore without a GPU goes.

Their primitives can be made, with the device's library and target "GPU". That MindSpore's own
calls of them are right (attributes, shapes, the workspace asked for) is shown with the emulated
library in place of the real one, whose memory is the CPU's: target "CPU" then.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from device_arrays import get, put
from helpers.arguments import make_arguments
from helpers.builders import normal, paged
from helpers.tolerances import assert_equal_bits

from codellama_rt.ops.schema import OPS

mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")

from codellama_rt.model.cuda import ops  # noqa: E402
from codellama_rt.ops import graph, primitives  # noqa: E402

CUDA_OPS = [name for name in OPS if name not in primitives.CPU_ONLY]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A file where the build would have put the kernels: what a primitive names, none opens."""
    path = tmp_path / "libcodellama_rt_cuda.so"
    path.touch()
    monkeypatch.setitem(primitives.DEVICES, "cuda", ("GPU", path))
    primitives.make_primitive.cache_clear()
    yield path
    primitives.make_primitive.cache_clear()


@pytest.mark.parametrize("name", CUDA_OPS)
def test_a_primitive_names_the_library(library, name):
    made = graph.primitive(name, target="GPU")
    assert made.attrs["func_name"] == f"{library}:clrt_{name}"
    assert made.attrs["primitive_target"] == "GPU"
    assert graph.primitive(name, target="GPU") is made
    assert graph.primitive(name, target="CPU") is graph.primitive(name)
    assert graph.primitive(name) is not made


def test_the_context_chooses(library, monkeypatch):
    monkeypatch.setattr(mindspore, "get_context", {"device_target": "GPU"}.get)
    assert graph.primitive("rms_norm") is graph.primitive("rms_norm", target="GPU")


def test_what_the_device_has_not(library):
    with pytest.raises(ValueError, match="decoder_layer has no kernel for cuda"):
        graph.primitive("decoder_layer", target="GPU")
    with pytest.raises(ValueError, match="target must be CPU or GPU, got 'Ascend'"):
        graph.primitive("rms_norm", target="Ascend")
    library.unlink()
    primitives.make_primitive.cache_clear()
    with pytest.raises(RuntimeError, match=r"cuda has no kernels here \(libcodellama_rt_cuda\.so"):
        graph.primitive("rms_norm", target="GPU")


# --- by MindSpore itself, over the emulated library -----------------------------------------


@pytest.fixture
def registered(emulated, tmp_path, monkeypatch):
    """Emulated kernels as MindSpore calls them, without a workspace of the runtime's."""
    monkeypatch.chdir(tmp_path)  # MindSpore writes reports into the current folder
    (path,) = Path(emulated.__file__).parent.glob("libcodellama_rt_cuda*.so")
    monkeypatch.setitem(primitives.DEVICES, "cuda", ("CPU", path))
    monkeypatch.setattr(graph, "device", lambda: "cuda")
    primitives.make_primitive.cache_clear()
    emulated.set_workspace(0, 0)
    yield ctypes.CDLL(str(path))
    primitives.make_primitive.cache_clear()


def asnumpy(results):
    made = results if isinstance(results, tuple) else (results,)
    return [tensor.astype(mindspore.float32).asnumpy() for tensor in made]


def tensors_of(arrays):
    return [mindspore.Tensor.from_numpy(np.ascontiguousarray(array)) for array in arrays]


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_attention_runs_split_in_the_workspace_it_asked_for(rng, registered, mode):
    case = paged(
        rng, [700, 20], [1, 1], heads=(4, 2), head_dim=128, dtype="float16", cache_dtype="float16"
    )

    @mindspore.jit
    def compiled(*tensors):
        return graph.paged_attention(*tensors)

    function = compiled if mode == "jit" else graph.paged_attention
    got = asnumpy(function(*tensors_of(case.arguments)))
    assert registered.emulated_threads() == 4 * 32  # the split kernel's
    expected = get(*ops.paged_attention(*put(*case.arguments)))
    assert registered.emulated_threads() == 3 * 128  # wgmma's: a direct call has no workspace here
    for mine, direct in zip(got, expected, strict=True):
        assert_equal_bits(mine, direct.astype(np.float32))


@pytest.mark.parametrize("name", ["rms_norm", "linear", "silu_and_mul", "merge_attention"])
def test_other_ops(rng, registered, name):
    made = make_arguments(OPS[name])
    arrays = {argument: made[argument] for argument in OPS[name].inputs}
    if name == "linear":
        arrays = {"x": normal(rng, (2, 64), "float16"), "weight": normal(rng, (5, 64), "float16")}
    got = asnumpy(getattr(graph, name)(*tensors_of(arrays.values())))
    expected = getattr(ops, name)(*[put(array) for array in arrays.values()])
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, direct in zip(got, expected, strict=True):
        assert_equal_bits(mine, get(direct).astype(np.float32))
