"""The limits of this machine for any kernel: read bandwidth and arithmetic, measured here and now.

Every performance figure is reported as a share of these limits, measured in the same run with the
threads and the instruction set that the operators use.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.ops.native import _core

PROBE_BYTES = 2**28  # several times any cache, so that every byte comes from memory
MOST_OF_ROOF = 1.005  # a share that rounds to more than 100 % is not a share
_ROUNDS = 50_000  # about a millisecond
_MEASURED = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Limits:
    """Upper limits for every performance figure.

    Attributes:
        isa: instruction set in use.
        num_threads: threads in use.
        read_bandwidth: bytes per second read by all threads together.
        one_thread_bandwidth: bytes per second read by a single thread.
        flops: FLOP/s by dtype of the operands; float16 is computed in float32.
    """

    isa: str
    num_threads: int
    read_bandwidth: float
    one_thread_bandwidth: float
    flops: dict[str, float]

    def describe(self) -> str:
        """Return the limits as one line of text."""
        flops = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in self.flops.items())
        return (
            f"{self.isa}, {self.num_threads} threads: read {self.read_bandwidth / 1e9:.1f} GB/s "
            f"(one thread alone {self.one_thread_bandwidth / self.read_bandwidth:.0%} of it); "
            f"GFLOP/s: {flops}"
        )


def of_roof(share: float) -> str:
    """Return a share of a measured limit as text.

    More than the limit is not a result but a limit that moved: the machine was slower while it was
    measured than during the run, or the run's bytes came from a cache. Such a share is marked.

    Example:
        >>> of_roof(0.83), of_roof(2.63)
        ('83%', '>100%')
    """
    return f"{share:.0%}" if share <= MOST_OF_ROOF else ">100%"


def measure_limits(seconds: float = 0.2) -> Limits:
    """Measure all limits.

    Args:
        seconds: time for each of the five measurements.

    Example:
        >>> measure_limits(0.01).num_threads >= 1
        True
    """
    float32, bfloat16, int8 = (peak_flops(dtype, seconds) for dtype in _MEASURED)
    flops = {"float32": float32, "float16": float32, "bfloat16": bfloat16, "int8": int8}
    num_threads, together = ops.num_threads(), read_bandwidth(seconds)
    ops.set_num_threads(1)
    try:
        alone = read_bandwidth(seconds)
    finally:
        ops.set_num_threads(num_threads)
    return Limits(ops.isa(), num_threads, together, alone, flops)


def read_bandwidth(seconds: float = 0.2, num_bytes: int = PROBE_BYTES) -> float:
    """Return bytes per second that all threads read from memory together; the best pass.

    Each byte is read once.

    Args:
        seconds: how long to repeat; at least three passes.
        num_bytes: size of the memory that is read; allocated during the call.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # like the KV cache: no cost of small memory pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    view.fill(1)  # commits the memory; unwritten pages would all map to one page of zeros
    return num_bytes / _shortest(lambda: _core.read_memory(view), seconds)


def peak_flops(dtype: str, seconds: float = 0.2) -> float:
    """Return FLOP/s of all threads on registers only; the best pass.

    Args:
        dtype: of the operands: "float32", "bfloat16" (pairs) or "int8" (quadruples). On CPUs
            without such instructions the result is float32's rate, which kernels fall back to.
        seconds: how long to repeat; at least three passes.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in _MEASURED:
        raise ValueError(f"dtype must be one of {', '.join(_MEASURED)}, got {dtype!r}")
    flops = _core.multiply_add(dtype, _ROUNDS)
    return flops / _shortest(lambda: _core.multiply_add(dtype, _ROUNDS), seconds)


def _shortest(run: Callable[[], object], seconds: float) -> float:
    """Return the shortest of the runs that fit into `seconds`: noise only makes runs longer."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return min(times)
