"""Builds the C++ part with CMake; everything else stands in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, compiles and installs all CMake targets into the package's folder."""

    def build_extension(self, ext: Extension) -> None:
        """Put `_core` and `libcodellama_rt_*.so` side by side, in the wheel and in the source tree.

        In the tree an editable install finds them; and after `pip install .` Python works there,
        too, where it finds the sources before what is installed.
        """
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("CODELLAMA_RT_BUILD_DIR") or self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_cmake()
        require_compiler()
        ninja = shutil.which("ninja")  # named anew each time: pip's build environment has moved
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        subprocess.run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(build),
                *generator,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython3_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11_dir()}",
                f"-DCODELLAMA_RT_CUDA={os.environ.get('CODELLAMA_RT_CUDA') or 'AUTO'}",
                f"-DCODELLAMA_RT_ASCEND={os.environ.get('CODELLAMA_RT_ASCEND') or 'OFF'}",
            ],
            check=True,
        )
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        tree = ROOT / "codellama_rt"
        for folder in (package, tree):
            subprocess.run([cmake, "--install", str(build), "--prefix", str(folder)], check=True)
        reports = ["--prefix", str(tree), "--component", "development"]  # not for a wheel
        subprocess.run([cmake, "--install", str(build), *reports], check=True)


def find_cmake() -> str:
    """Return the cmake on the path (pip's build environment brings one)."""
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("codellama_rt: no cmake found; install it with `pip install cmake` and try again.")
    return cmake


def require_compiler() -> None:
    """Say in one sentence what CMake would say in forty lines."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        sys.exit(
            f"codellama_rt: no C++17 compiler found ({', '.join(names)}); "
            "install one (Debian: `apt-get install g++`) or set CXX, and try again."
        )


def pybind11_dir() -> str:
    """Where pybind11's CMake files lie."""
    import pybind11

    return pybind11.get_cmake_dir()


def cuda_wheels() -> list[str]:
    """Return what pip installs to build with CODELLAMA_RT_CUDA=ON and no nvcc on the path."""
    if os.environ.get("CODELLAMA_RT_CUDA") != "ON" or shutil.which("nvcc"):
        return []
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^cuda-build = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r'^\s*"([^"]+)"', extra, re.MULTILINE)


setup(
    ext_modules=[Extension("codellama_rt._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=cuda_wheels(),
)
