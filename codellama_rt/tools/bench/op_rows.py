"""Benchmark rows of operators: time, GB/s, GFLOP/s, what bounds it, and the share of that limit."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.tools.bench.measure import Row, Stopwatch, Timing, stopwatch
from codellama_rt.tools.bench.op_arrays import Turns, make_arrays
from codellama_rt.tools.bench.op_cases import Case, Selection
from codellama_rt.tools.bench.op_check import check
from codellama_rt.tools.limits import peak_flops, read_bandwidth

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
    read, peak = (max(pair) for pair in zip(before, _roof(case), strict=True))
    return _row(case, timing, read, peak)


def op_rows(
    selection: Selection, isas: list[str], seconds: float
) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows of a selection on each instruction set, each as (done, total, row)."""
    cases, before = list(selection.cases()), ops.isa()
    if not cases:
        raise ValueError("no operator supports this dtype, or none is selected")
    total = len(isas) * len(cases)
    try:
        for i, isa in enumerate(isas):
            ops.set_isa(isa)
            for j, case in enumerate(cases, 1):
                yield i * len(cases) + j, total, op_row(case, seconds)
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


def _roof(case: Case) -> tuple[float, float]:
    """Return the current limits of bytes and FLOPs per second; the higher of two measurements."""
    dtype = case.product_dtype
    peak = peak_flops("float32" if dtype == "float16" else dtype, LIMITS_SECONDS)
    return read_bandwidth(LIMITS_SECONDS), peak


def _row(case: Case, timing: Timing, read: float, peak: float) -> Row:
    memory_s, compute_s = case.num_bytes / read, case.flops / peak
    floor = max(memory_s, compute_s)
    bound = "call" if floor < CALL_SECONDS else "memory" if memory_s == floor else "compute"
    return {
        "what": "op",
        "op": case.op.name,
        "dtype": case.dtype,
        "model": case.model,
        "shape": case.label,
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
        "peak_gflop_per_s": peak / 1e9,
    }
