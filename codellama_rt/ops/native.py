"""What the kernels run on: the instruction set, the threads, the devices."""

from __future__ import annotations

import os

from codellama_rt import _core
from codellama_rt.ops.ascend_library import available as ascend_available


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


def num_threads() -> int:
    """Return the number of threads per op (default: all CPUs this process may run on)."""
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Use `n` threads per op from now on (also: environment CODELLAMA_RT_NUM_THREADS).

    Results do not depend on it: every bit stays the same.
    """
    _core.set_num_threads(n)


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
        from codellama_rt.ops.cuda_device import available as cuda_available

        return cuda_available()
    if device == "ascend":
        return ascend_available()
    raise ValueError(f"device must be 'cpu', 'cuda' or 'ascend', got {device!r}")


_asked = os.environ.get("CODELLAMA_RT_ISA")
if _asked:
    try:
        set_isa(_asked)
    except ValueError as error:
        raise ValueError(f"CODELLAMA_RT_ISA={_asked}: {error}") from None
