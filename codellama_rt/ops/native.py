"""What the kernels run on: the instruction set, the threads, the devices, huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import mmap
import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np

from codellama_rt.errors import unavailable
from codellama_rt.ops.ascend_library import available as ascend_available

_PACKAGE = Path(__file__).resolve().parent.parent
_CUDA = "codellama_rt._cuda"
_DRIVER = "libcuda.so.1"


def _kernels() -> ModuleType:
    """Import the compiled module beside this file; another installation's would not fit."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module("codellama_rt._core")
        if Path(module.__file__).resolve().parent == _PACKAGE:
            return module
    raise ImportError(f"codellama_rt has no kernels (_core) in {_PACKAGE}; {_remedy()}")


def _remedy() -> str:
    """Return what the user can do about missing kernels."""
    if (_PACKAGE.parent / "CMakeLists.txt").is_file():
        return (
            f"{_PACKAGE.parent} is a source tree without compiled kernels: run `pip install -e .` "
            "in it, or start Python elsewhere to use the installed package"
        )
    return "they were built for another Python than this one: install the package again with it"


_core = _kernels()


def available_isas() -> list[str]:
    """Return the instruction sets that both this CPU and this build support, best first."""
    return _core.available_isas()


def isa() -> str:
    """Return the instruction set in use."""
    return _core.isa()


def set_isa(name: str) -> None:
    """Choose the instruction set for all later calls (also: environment CODELLAMA_RT_ISA).

    Args:
        name: one of `available_isas()`.

    Raises:
        ValueError: this CPU or this build does not support it.
    """
    _core.set_isa(name)


@functools.cache
def build_digest() -> str:
    """Return a digest of the compiled kernels: another build may round differently."""
    hasher = hashlib.blake2b(digest_size=16)
    for path in sorted([Path(_core.__file__), *_PACKAGE.glob("libcodellama_rt_cpu.*")]):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def num_threads() -> int:
    """Return the number of threads per op.

    The default is the first of: the environment variable CODELLAMA_RT_NUM_THREADS;
    OMP_NUM_THREADS; the CPUs this process may run on, or the CPU quota of its control group
    (cgroup), rounded up, if that is less.
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Use `n` threads per op from now on (also: environment CODELLAMA_RT_NUM_THREADS).

    Results do not depend on it: every bit stays the same. The threads start with the next op.

    Raises:
        ValueError: `n` is less than 1. An op raises RuntimeError if `n` threads cannot be started;
            calls with fewer work after that.
    """
    _core.set_num_threads(n)


def map_huge_pages(num_bytes: int) -> np.ndarray:
    """Map zeroed memory, in huge pages where the system has them; none is committed yet.

    What every step reads misses fewer translations of addresses there.

    Args:
        num_bytes: at least 1.

    Returns:
        (num_bytes) uint8, which holds the mapping.

    Raises:
        OSError, ValueError: the system has no such memory.
    """
    # Private: what mmap shares by default gets no huge pages on most systems.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def available(device: str = "cpu") -> tuple[bool, str]:
    """Return whether a device can be used, and why or why not.

    Args:
        device: "cpu", "cuda" or "ascend".

    Returns:
        (True, a description) or (False, the reason).

    Raises:
        ValueError: an unknown device name.

    Example:
        >>> available("cpu")[0]
        True
    """
    if device == "cpu":
        return True, f"{isa()}, {num_threads()} threads"
    if device == "cuda":
        return _cuda_available()
    if device == "ascend":
        return ascend_available()
    raise ValueError(f"device must be 'cpu', 'cuda' or 'ascend', got {device!r}")


def cuda() -> ModuleType:
    """Return the compiled module `_cuda`.

    Raises:
        RuntimeError: this build has no CUDA kernels; `available` says the same without raising.
    """
    try:
        return importlib.import_module(_CUDA)
    except ImportError as error:
        raise RuntimeError(_absence_of_cuda(error)) from None


def _cuda_available() -> tuple[bool, str]:
    """Return whether the kernels are built and a device is present, with its name or the reason."""
    try:
        built = importlib.import_module(_CUDA)
    except ImportError as error:
        return False, _absence_of_cuda(error)
    reason = built.unavailable_reason()
    if not reason:
        return True, built.device_name()
    remedy = ""
    if not has_nvidia_driver():  # CUDA itself reports an insufficient version
        reason, remedy = "no NVIDIA driver found", "install the driver of your GPU"
    elif "insufficient" in reason:
        remedy = "install a newer NVIDIA driver"
    elif "none is visible" in reason:
        remedy = "name it in CUDA_VISIBLE_DEVICES, or pass it to this container"
    return False, unavailable(f"cuda kernels are built, but {reason}", remedy)


def has_nvidia_driver() -> bool:
    """Return whether NVIDIA's driver is installed: its library is what CUDA's runtime opens."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _absence_of_cuda(error: ImportError) -> str:
    """Return why the CUDA kernels cannot be imported, and what to do."""
    again = "install this package with CODELLAMA_RT_CUDA=ON"
    if not isinstance(error, ModuleNotFoundError) or error.name != _CUDA:
        return unavailable(f"the cuda kernels cannot be loaded: {error}", f"{again} again")
    if has_nvidia_driver():
        return unavailable("this build has no cuda kernels, only the NVIDIA driver is there", again)
    missing = "this build has no cuda kernels, and no NVIDIA driver was found"
    return unavailable(missing, f"to use a GPU install its driver, then {again}")


def control_groups(controller: str, root: str = "") -> list[Path]:
    """Return the folders of this process's control groups (cgroups), its own first.

    A limit in any of them holds. Both versions of control groups are looked for; groups that are
    not visible in this container are left out.

    Args:
        controller: "cpu" or "memory".
        root: prefix of all paths that are read.
    """
    return [Path(folder) for folder in _core.control_groups(controller, root)]


def _omp_num_threads() -> int | None:
    """Return the first number of OMP_NUM_THREADS; like OpenMP, ignore a malformed list.

    Python's copy of the environment is read, not the process's: MindSpore puts OMP_NUM_THREADS=1
    into the latter when it is imported.
    """
    numbers = os.environ.get("OMP_NUM_THREADS", "").split(",")
    if not all(re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", number) for number in numbers):
        return None
    return int(numbers[0])


def _apply_environment() -> None:
    """Apply the variables that choose the instruction set and the threads.

    Raises:
        ValueError: one of ours has a value that cannot be used.
    """
    asked = os.environ.get("CODELLAMA_RT_ISA")
    if asked:
        try:
            set_isa(asked)
        except ValueError as error:
            raise ValueError(f"CODELLAMA_RT_ISA={asked}: {error}") from None
    threads = None if os.environ.get("CODELLAMA_RT_NUM_THREADS") else _omp_num_threads()
    if threads is None:
        num_threads()  # the library's own default: a bad CODELLAMA_RT_NUM_THREADS is refused here
    else:
        set_num_threads(threads)


_apply_environment()
