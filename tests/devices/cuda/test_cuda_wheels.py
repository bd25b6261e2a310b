"""What pip is asked to bring for a build with CUDA where no nvcc is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
CODE = "from setuptools import build_meta as b; print(*b.get_requires_for_build_wheel(), sep='\\n')"


def required(folder, wanted):
    """The build's requirements where `folder`/bin is the path."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / "bin").mkdir(exist_ok=True)
    environment = {**os.environ, "CODELLAMA_RT_CUDA": wanted, "PATH": str(folder / "bin")}
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return result.stdout.splitlines()


def test_the_compiler_comes_with_a_build_that_insists(tmp_path):
    lines = required(tmp_path, "ON")
    assert [line for line in lines if re.fullmatch(r"nvidia-cuda-nvcc==13\.0\.\d+", line)]
    names = {"nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"}
    assert names <= {line.split("==")[0] for line in lines}


@pytest.mark.parametrize(("wanted", "has_nvcc"), [("AUTO", False), ("OFF", False), ("ON", True)])
def test_no_other_build_needs_it(tmp_path, wanted, has_nvcc):
    if has_nvcc:
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir()
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
    assert not [line for line in required(tmp_path, wanted) if line.startswith("nvidia")]


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
@pytest.mark.parametrize("wanted", ["yes", "1", "on"])
def test_a_build_refuses_what_is_no_choice(wanted):
    script = REPOSITORY / "csrc" / "cuda" / "cuda.cmake"
    command = ["cmake", f"-DCODELLAMA_RT_CUDA={wanted}", "-P", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"CODELLAMA_RT_CUDA must be ON, OFF or AUTO, got '{wanted}'" in result.stderr
