"""The device that the CUDA tests run on: emulated on the CPU everywhere, and a GPU where one is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pybind11
import pytest
from helpers.building import building

from codellama_rt.model.cuda import tensor
from codellama_rt.ops import native

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.append(str(REPOSITORY / "benchmarks" / "cuda"))
NAME = "codellama_rt._cuda"
WORKSPACE_BYTES = 8 << 20


def _run(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"


@pytest.fixture(scope="session")
def emulated_module():
    """`_cuda` with the emulator in CUDA's place, built unless benchmarks/cuda/run.sh names it."""
    path = Path(os.environ.get("EMULATED") or _built())
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built() -> Path:
    """Return the emulated module, compiled when its sources changed."""
    build = REPOSITORY / "build" / "cuda_emulated"
    with building(build):
        _run(
            "cmake", "-S", str(REPOSITORY / "tests/emulators/cuda"), "-B", str(build), "-G",
            "Ninja", f"-DPython3_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )  # fmt: skip
        _run("cmake", "--build", str(build), "--parallel", str(min(os.cpu_count() or 1, 4)))
    (path,) = build.glob("_cuda_emulated.*.so")
    return path


@pytest.fixture(params=["emulated", "gpu"])
def cuda(request, monkeypatch):
    """The device's module, in the place where the package looks for it, with a workspace."""
    if request.param == "emulated":
        module = request.getfixturevalue("emulated_module")
    else:
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        usable, reason = native.available("cuda")
        if not usable:
            pytest.skip(reason)
        module = native.cuda()
    monkeypatch.setitem(sys.modules, NAME, module)
    memory = tensor.Memory(WORKSPACE_BYTES)
    module.set_stream(0)
    module.set_workspace(memory.pointer, WORKSPACE_BYTES)
    yield module
    module.set_workspace(0, 0)
    module.synchronize()


@pytest.fixture
def emulated(emulated_module, monkeypatch):
    """The emulator alone, for what is slow or has no meaning on a GPU."""
    monkeypatch.setitem(sys.modules, NAME, emulated_module)
    memory = tensor.Memory(WORKSPACE_BYTES)
    emulated_module.set_workspace(memory.pointer, WORKSPACE_BYTES)
    yield emulated_module
    emulated_module.set_workspace(0, 0)


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)
