"""The library of CUDA kernels, loaded on demand; whether it can be used, and why not."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType

_NAME = "codellama_rt._cuda"
_DRIVER = "libcuda.so.1"


def module() -> ModuleType:
    """The compiled module `_cuda`.

    Raises:
        RuntimeError: this build has none; `available` says the same without raising.
    """
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        raise RuntimeError(f"{_absence(error)}; available: cpu") from None


def available() -> tuple[bool, str]:
    """Whether the kernels are built and a device is there, and what it is or why not."""
    try:
        built = importlib.import_module(_NAME)
    except ImportError as error:
        return False, f"{_absence(error)}; available: cpu"
    reason = built.unavailable_reason()
    if reason and not has_driver():
        reason = "no NVIDIA driver found"  # CUDA calls a missing driver one of a too low version
    if reason:
        return False, f"cuda kernels are built, but {reason}; available: cpu"
    return True, built.device_name()


def has_driver() -> bool:
    """Return whether NVIDIA's driver is installed: its library is what CUDA's runtime opens."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _absence(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == _NAME:
        return "this build has no cuda kernels (no nvcc when it was installed)"
    return f"the cuda kernels cannot be loaded: {error}"
