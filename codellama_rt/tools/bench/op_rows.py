"""Benchmark rows of operators: time, GB/s, GFLOP/s, what bounds it, and the share of that limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.tools.bench.measure import Row, Stopwatch, Timing, drift, steadiest, stopwatch
from codellama_rt.tools.bench.op_arrays import Turns, make_arrays
from codellama_rt.tools.bench.op_cases import Case, Selection
from codellama_rt.tools.bench.op_check import check
from codellama_rt.tools.limits import peak, read_bandwidth

MIN_RUNS, MAX_RUNS = 20, 2000
CALL_SECONDS = 2e-6  # below this, the call from Python dominates
LIMITS_SECONDS = 0.03  # spent on each limit, before and after each row


def op_row(case: Case, seconds: float, watch: Stopwatch = stopwatch) -> Row:
    """Check a case, then time it beside the limits measured at the same moment.

    Args:
        case: what to run.
        seconds: time to spend, at least `MIN_RUNS` runs.
        watch: times the runs.
    """
    arrays = make_arrays(case, np.random.default_rng(0))
    check(case, arrays)
    turns = Turns(case, arrays)
    del arrays
    before = _roof(case)
    timing = Timing(watch(turns.run, turns.advance, _rounds(turns, seconds)))
    return _row(case, timing, before, _roof(case))


def op_rows(
    selection: Selection, isas: list[str], seconds: float
) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows of a selection on each instruction set, each as (done, total, row).

    A row whose limit moved is measured again.
    """
    cases, before = list(selection.cases()), ops.isa()
    if not cases:
        raise ValueError("no operator supports this dtype, or none is selected")
    total = len(isas) * len(cases)
    try:
        for i, isa in enumerate(isas):
            ops.set_isa(isa)
            for j, case in enumerate(cases, 1):
                yield i * len(cases) + j, total, steadiest(lambda case=case: op_row(case, seconds))
    finally:
        ops.set_isa(before)


def _rounds(turns: Turns, seconds: float) -> int:
    """Warm up, and return how many runs fit into the time."""
    once = []
    for _ in range(3):
        turns.advance()
        started = perf_counter()
        turns.run()
        once.append(perf_counter() - started)
    return int(min(max(MIN_RUNS, seconds / min(once)), MAX_RUNS))


@dataclass(frozen=True)
class _Roof:
    """The limits at one moment: bytes and operations per second, and by which instruction."""

    read: float
    instruction: str
    peak: float


def _roof(case: Case) -> _Roof:
    return _Roof(read_bandwidth(LIMITS_SECONDS), *peak(case.product_dtype, LIMITS_SECONDS))


def _row(case: Case, timing: Timing, before: _Roof, after: _Roof) -> Row:
    """Return the row; its limits are the higher of two measurements."""
    read, rate = max(before.read, after.read), max(before.peak, after.peak)
    memory_s, compute_s = case.num_bytes / read, case.flops / rate
    floor = max(memory_s, compute_s)
    bound = "call" if floor < CALL_SECONDS else "memory" if memory_s == floor else "compute"
    moved = {
        "call": 0.0,
        "memory": drift(before.read, after.read),
        "compute": drift(before.peak, after.peak),
    }
    return {
        "what": "op",
        "op": case.op.name,
        "dtype": case.dtype,
        "model": case.model,
        "shape": case.label,
        "tokens": case.sizes["num_tokens"],
        "isa": ops.isa(),
        "threads": ops.num_threads(),
        **timing.record(),
        "bytes": case.num_bytes,
        "flops": case.flops,
        "bound": bound,
        "gb_per_s": case.num_bytes / timing.median / 1e9,
        "gflop_per_s": case.flops / timing.median / 1e9,
        "limit_us": 1e6 * floor,
        "share": floor / timing.median,
        "best_share": floor / timing.best,
        "read_gb_per_s": read / 1e9,
        "product_dtype": case.product_dtype,
        "instruction": after.instruction,
        "peak_gflop_per_s": rate / 1e9,
        "roof_drift": moved[bound],
    }
