"""What the kernels run on: instruction set, threads, devices."""

from __future__ import annotations

import os

from codellama_rt import _core
from codellama_rt.ops.ascend_library import available as ascend_available


def available_isas() -> list[str]:
    """Instruction sets that this CPU and build have, best first."""
    return _core.available_isas()


def isa() -> str:
    """The instruction set in use."""
    return _core.isa()


def set_isa(name: str) -> None:
    """Choose the instruction set for all later calls (also: environment CODELLAMA_RT_ISA).

    Args:
        name: one of `available_isas()`.

    Raises:
        ValueError: this CPU or build lacks it.
    """
    _core.set_isa(name)


def num_threads() -> int:
    """Threads that one op uses; the CPUs this process may run on, unless set."""
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Use `n` threads an op from now on (also: environment CODELLAMA_RT_NUM_THREADS).

    No result depends on it, to the last bit.
    """
    _core.set_num_threads(n)


def available(device: str = "cpu") -> tuple[bool, str]:
    """Whether a device can be used, and why (not).

    Args:
        device: "cpu", "cuda" or "ascend".

    Returns:
        (True, what it is) or (False, the reason).

    Raises:
        ValueError: no such device name.

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
