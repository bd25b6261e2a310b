"""Builds the emulated Ascend device once, and gives its ops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aclnn import Aclnn
from helpers.building import building

REPOSITORY = Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "build" / "ascend"


@pytest.fixture(scope="session")
def ascend_build() -> Path:
    """The folder with the libraries of CODELLAMA_RT_ASCEND=EMU, built if they are not current."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake to build the Ascend emulator with: pip install cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    configure = ["cmake", "-S", REPOSITORY / "csrc" / "ascend", "-B", BUILD, *generator]
    options = ["-DCODELLAMA_RT_ASCEND=EMU", "-DCODELLAMA_RT_ASCEND_TESTS=ON",
               f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
    with building(BUILD):
        for command in ([*configure, *options], ["cmake", "--build", BUILD, "--parallel", jobs]):
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return BUILD


@pytest.fixture(scope="session")
def library(ascend_build) -> Aclnn:
    return Aclnn(ascend_build / "libcodellama_rt_ascend_emu.so")


@pytest.fixture
def aclnn(library) -> Aclnn:
    """The ops, on the 40 vector cores of a 910B unless a test asks for others."""
    library.set_cores(40)
    return library


@pytest.fixture
def device(ascend_build, library, monkeypatch) -> None:
    """`codellama_rt.ops.ascend` on the emulator; four cores, which is enough to share work."""
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(ascend_build))
    library.set_cores(4)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230824)
