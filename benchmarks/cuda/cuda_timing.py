"""How the CUDA benchmarks measure: graphs replayed in turn, medians of CUDA events, the limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from codellama_rt.model.cuda.tensor import DeviceTensor, Memory, empty, to_device
from codellama_rt.ops import native

Work = Callable[[], object]
WARM_UP = 3
_STRETCH = 1 << 22  # random elements that large tensors repeat


@dataclass(frozen=True)
class Timing:
    """Microseconds per run."""

    us: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the shape; rows with the same `what` are compared.
        who: "ours" or a peer.
        us, p10, p90: median and deciles, microseconds.
        rate: in `unit`: "TB/s", "TFLOP/s" or "token/s".
        share: of the limit named `of`; None: no limit was measured.
    """

    what: str
    who: str
    us: float
    p10: float
    p90: float
    rate: float
    unit: str
    share: float | None = None
    of: str = ""


class Graph:
    """`work`, captured on the current stream once it has run."""

    def __init__(self, work: Work) -> None:
        """Run once (this loads the kernels, which a capture must not do), then capture."""
        self._module = native.cuda()
        work()
        self._module.synchronize()
        self._module.begin_capture()
        try:
            work()
        finally:
            self._graph = self._module.end_capture()

    def __call__(self) -> None:
        """Launch it on the stream."""
        self._module.launch_graph(self._graph)

    def __del__(self) -> None:
        """Destroy the graph."""
        if getattr(self, "_graph", 0):
            self._module.destroy_graph(self._graph)


def timed(contenders: dict[str, Work], repeats: int, runs: int = 1) -> dict[str, Timing]:
    """Time the contenders in turn, so that clocks and temperature are the same for all.

    Args:
        contenders: what each puts on the current stream.
        repeats: number of timed calls of each.
        runs: runs of the operator per call; the times are of one run.
    """
    module = native.cuda()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + WARM_UP):
        for name, work in contenders.items():
            times[name].append(1e3 * module.elapsed_ms(work) / runs)
    return {name: summary(some[WARM_UP:]) for name, some in times.items()}


def summary(times: list[float]) -> Timing:
    """Return median and deciles."""
    low, high = np.percentile(times, (10, 90))
    return Timing(statistics.median(times), float(low), float(high))


def read_roof(num_bytes: int, repeats: int) -> float:
    """Return the bytes per second of a kernel that only reads."""
    memory, out = Memory(num_bytes), empty((1,), "float32")
    module = native.cuda()
    module.fill_async(memory.pointer, 1, num_bytes)
    work = Graph(lambda: module.read_sum(memory.pointer, num_bytes, out.device_ptr))
    return num_bytes / timed({"ours": work}, repeats)["ours"].us * 1e6


def copy_roof(num_bytes: int, repeats: int) -> float:
    """Return the bytes per second, read plus written, of the driver's own copy."""
    source, target = Memory(num_bytes // 2), Memory(num_bytes // 2)
    module = native.cuda()
    module.fill_async(source.pointer, 1, source.num_bytes)
    work = Graph(lambda: module.copy_async(target.pointer, source.pointer, source.num_bytes))
    return 2 * source.num_bytes / timed({"ours": work}, repeats)["ours"].us * 1e6


def repeat(pointer: int, num_bytes: int, stretch: np.ndarray) -> None:
    """Fill device memory with a host array, over and over."""
    module = native.cuda()
    source = to_device(np.ascontiguousarray(stretch).view(np.uint8).reshape(-1))
    done = min(source.nbytes, num_bytes)
    module.copy_async(pointer, source.device_ptr, done)
    while done < num_bytes:  # append a copy of what is filled already
        step = min(done, num_bytes - done)
        module.copy_async(pointer + done, pointer, step)
        done += step
    module.synchronize()


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> DeviceTensor:
    """Return normal numbers in bfloat16: one stretch of them repeated, from a random offset on."""
    tensor, stretch = empty(shape, "bfloat16"), _normal_stretch()
    begin = int(rng.integers(len(stretch)))
    some = np.concatenate([stretch[begin:], stretch[:begin]])[: tensor.size]
    repeat(tensor.device_ptr, tensor.nbytes, some)
    return tensor


@lru_cache(maxsize=1)
def _normal_stretch() -> np.ndarray:
    """Return the stretch, made once: the 224 matrices of a 7B model would take too long."""
    numbers = np.random.default_rng(0).standard_normal(_STRETCH, np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)
