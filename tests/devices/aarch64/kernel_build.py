"""Cross-compiles the CPU library for Arm hosts, and the program that runs the tests' kernels there.

As a program it does so ahead of the tests, which then find it built:

    PYTHONPATH=tests python tests/devices/aarch64/kernel_build.py
"""

import os
import shutil
import subprocess
from pathlib import Path

from helpers.building import building

REPOSITORY = Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "build" / "aarch64"
COMPILER = "aarch64-linux-gnu-g++"


def kernel_server() -> Path:
    """Return the program, built if it is not current."""
    program = BUILD / "kernel_server"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={REPOSITORY / 'csrc' / 'cpu' / 'aarch64.cmake'}"
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    with building(BUILD):
        for command in (
            ["cmake", "-S", REPOSITORY, "-B", BUILD, *generator, toolchain],
            ["cmake", "--build", BUILD, "--parallel", jobs],
            [
                COMPILER, "-std=c++17", "-O1", "-I", REPOSITORY / "csrc",
                Path(__file__).with_name("kernel_server.cc"), "-o", program,
                "-L", BUILD, "-lcodellama_rt_cpu", f"-Wl,-rpath,{BUILD}", "-pthread",
            ],
        ):  # fmt: skip
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return program


if __name__ == "__main__":
    kernel_server()
