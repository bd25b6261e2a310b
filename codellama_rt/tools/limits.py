"""The limits of this machine for any kernel: read bandwidth and arithmetic, measured here and now.

Every performance figure is reported as a share of these limits, measured in the same run with the
same number of threads. A limit of arithmetic is that of the fastest instruction that can do the
work, of any instruction set that this CPU runs: the set in use may have chosen a slower one.
"""

from __future__ import annotations

import mmap
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.ops.native import _core

PROBE_BYTES = 2**28  # several times any cache, so that every byte comes from memory
MOST_OF_ROOF = 1.005  # a share that rounds to more than 100 % is not a share
# Instructions that can multiply operands of a dtype exactly enough, the most special one last: that
# is what the kernels of a set use. An int8 product may be computed in int16 or float32 as well.
USABLE = {
    "float32": ("fp32 FMA",),
    "float16": ("fp32 FMA",),
    "bfloat16": ("fp32 FMA", "vdpbf16ps"),
    "int8": ("fp32 FMA", "vpmaddwd", "vpdpwssd", "vpdpbusd"),
}
_ROUNDS = 50_000  # about a millisecond
_CPU_NUMBERS = (("cpu family", "family"), ("model", "model"))
_HUGE = 0.9  # of the probe's memory: what counts as measured with huge pages


@dataclass(frozen=True)
class Limits:
    """Upper limits for every performance figure.

    Attributes:
        isa: instruction set in use.
        num_threads: threads in use.
        read_bandwidth: bytes per second read by all threads together.
        one_thread_bandwidth: bytes per second read by a single thread.
        rates: operations per second of each instruction that this CPU has, by its name.
        huge_pages: share of the memory that was read that lay in huge pages.
    """

    isa: str
    num_threads: int
    read_bandwidth: float
    one_thread_bandwidth: float
    rates: dict[str, float]
    huge_pages: float = 1.0

    @property
    def flops(self) -> dict[str, float]:
        """FLOP/s (integers: operations) by dtype of the operands, of the fastest instruction."""
        return {dtype: self.rates[self.fastest(dtype)] for dtype in USABLE}

    def fastest(self, dtype: str) -> str:
        """Return the name of the fastest instruction for operands of a dtype."""
        return max((name for name in USABLE[dtype] if name in self.rates), key=self.rates.get)

    def describe(self) -> str:
        """Return the limits as one line of text."""
        rates = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in self.rates.items())
        pages = "" if self.huge_pages >= _HUGE else f", {self.huge_pages:.0%} of it in huge pages"
        return (
            f"{self.isa}, {self.num_threads} threads: read {self.read_bandwidth / 1e9:.1f} GB/s "
            f"(one thread alone {self.one_thread_bandwidth / self.read_bandwidth:.0%} of it{pages}"
            f"); GFLOP/s: {rates}"
        )


def cpu_name() -> str:
    """Return the name of the CPU, with the numbers that tell generations of one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [f"{name} {fields[key]}" for key, name in _CPU_NUMBERS if key in fields]
    return f"{fields['model name']} ({', '.join(numbers)})" if numbers else fields["model name"]


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
        seconds: time for each of the measurements: two of reading, one per instruction.

    Example:
        >>> measure_limits(0.01).num_threads >= 1
        True
    """
    rates = {name: instruction_rate(name, seconds) for name in instructions()}
    num_threads, memory = ops.num_threads(), probe_memory(PROBE_BYTES)
    huge = huge_share(memory)
    together = _read_rate(memory, seconds)
    ops.set_num_threads(1)
    try:
        alone = _read_rate(memory, seconds)
    finally:
        ops.set_num_threads(num_threads)
    return Limits(ops.isa(), num_threads, together, alone, rates, huge)


def read_bandwidth(
    seconds: float = 0.2, num_bytes: int = PROBE_BYTES, *, huge_pages: bool = True
) -> float:
    """Return bytes per second that all threads read from memory together; the best pass.

    Each byte is read once.

    Args:
        seconds: how long to repeat; at least three passes.
        num_bytes: size of the memory that is read; allocated during the call.
        huge_pages: ask for huge memory pages, as the KV cache does, or forbid them.
    """
    return _read_rate(probe_memory(num_bytes, huge_pages=huge_pages), seconds)


def probe_memory(num_bytes: int, *, huge_pages: bool = True) -> np.ndarray:
    """Return committed memory to read, (num_bytes) uint8, in huge pages as far as there are any."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    view.fill(1)  # commits the memory; unwritten pages would all map to one page of zeros
    return view


def huge_share(memory: np.ndarray) -> float:
    """Return the share of anonymous memory that lies in huge pages; 0 where Linux does not say."""
    try:
        maps = Path("/proc/self/smaps").read_text()
    except OSError:
        return 0.0
    begin = memory.ctypes.data
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", maps):
        first, last = (int(at, 16) for at in mapping.split(maxsplit=1)[0].split("-"))
        found = re.search(r"AnonHugePages: +(\d+) kB", mapping)
        if first <= begin < last and found:  # neighbours of the same kind may share the mapping
            return min(1.0, int(found[1]) * 1024 / memory.nbytes)
    return 0.0


def instructions() -> dict[str, str]:
    """Return the instructions that this CPU and build have, with an instruction set of each."""
    return {
        name: isa
        for name in _core.INSTRUCTIONS
        for isa in reversed(ops.available_isas())  # the best set that has it stays
        if _core.multiply_add(isa, name, 1)
    }


def instruction_rate(name: str, seconds: float = 0.2) -> float:
    """Return operations per second of all threads with an instruction, on registers; the best pass.

    Args:
        name: of `instructions`; a product and a sum are two operations.
        seconds: how long to repeat; at least three passes.

    Raises:
        ValueError: an instruction that this CPU does not have.
    """
    known = instructions()
    if name not in known:
        raise ValueError(f"instruction must be one of {', '.join(known)}, got {name!r}")
    return _rate(known[name], name, seconds)


def set_rates(isa: str, seconds: float = 0.2) -> dict[str, float]:
    """Return operations per second of the kernels' instructions in one set, by dtype of operands.

    Unlike `peak` these are not the fastest: a set that has vdpbf16ps uses it.

    Args:
        isa: one of `ops.available_isas()`; the set in use stays.
        seconds: for each instruction.
    """
    names = [name for name in _core.INSTRUCTIONS if _core.multiply_add(isa, name, 1)]
    used = {dtype: [n for n in usable if n in names][-1] for dtype, usable in USABLE.items()}
    rates = {name: _rate(isa, name, seconds) for name in set(used.values())}
    return {dtype: rates[name] for dtype, name in used.items()}


def peak(dtype: str, seconds: float = 0.2) -> tuple[str, float]:
    """Return the fastest instruction for operands of a dtype, and its operations per second.

    Args:
        dtype: of the operands: float32, float16, bfloat16 or int8.
        seconds: time for each instruction that can do it.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in USABLE:
        raise ValueError(f"dtype must be one of {', '.join(USABLE)}, got {dtype!r}")
    usable = [name for name in instructions() if name in USABLE[dtype]]
    rates = {name: instruction_rate(name, seconds) for name in usable}
    fastest = max(rates, key=rates.get)
    return fastest, rates[fastest]


def _rate(isa: str, name: str, seconds: float) -> float:
    operations = _core.multiply_add(isa, name, _ROUNDS)
    return operations / _shortest(lambda: _core.multiply_add(isa, name, _ROUNDS), seconds)


def _read_rate(memory: np.ndarray, seconds: float) -> float:
    return memory.nbytes / _shortest(lambda: _core.read_memory(memory), seconds)


def _shortest(run: Callable[[], object], seconds: float) -> float:
    """Return the shortest of the runs that fit into `seconds`: noise only makes runs longer."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return min(times)
