"""Every operator at Code Llama's shapes, against the limits of this machine in the same run.

    python benchmarks/bench_ops.py --shape 7b --tokens 1 16 512 --keys 512 16384

A row: op dtype shape isa threads | median (10th-90th percentile), best | GB/s | GFLOP/s | what
bounds it | share of that limit at the median (at the best). Bytes and FLOPs are those of the
schema; a written byte counts as a read one. Each row is checked against the reference first, and
its buffers take turns, so that they come from memory (but the rows that `embedding` looks up).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np
from limits import describe
from measure import Timing, save
from op_cases import Case, call, cases, check
from shapes import SHAPES

from codellama_rt import ops
from codellama_rt.dtypes import FLOAT_DTYPES
from codellama_rt.limits import PROBE_BYTES, Limits, measure_limits

MIN_RUNS, MAX_RUNS = 20, 2000
CALL_SECONDS = 2e-6  # below this a call from Python is what takes the time


def time_case(case: Case, seconds: float, rng: np.random.Generator) -> Timing:
    """Time calls over sets of buffers that together exceed any cache."""
    first = case.arrays(rng)
    set_bytes = sum(array.nbytes for array in first.values())
    copies = min(max(1, -(-PROBE_BYTES // set_bytes)), 64)
    sets = [first] + [{n: a.copy() for n, a in first.items()} for _ in range(copies - 1)]
    for arrays in sets[:3]:
        call(case.op, arrays)
    times: list[float] = []
    while len(times) < MIN_RUNS or (sum(times) < seconds and len(times) < MAX_RUNS):
        arrays = sets[len(times) % copies]
        started = perf_counter()
        call(case.op, arrays)
        times.append(perf_counter() - started)
    return Timing(times)


def row(case: Case, timing: Timing, limits: Limits) -> dict:
    """Print and return what was measured."""
    floor = limits.seconds(case.num_bytes, case.flops, case.product_dtype)
    is_memory = case.num_bytes / limits.read_bandwidth == floor
    bound = "call" if floor < CALL_SECONDS else "memory" if is_memory else "compute"
    print(
        f"{case.op.name:20} {case.dtype:8} {case.label:24} {limits.isa} {limits.num_threads} | "
        f"{timing.text():>40} | {case.num_bytes / timing.median / 1e9:6.1f} GB/s | "
        f"{case.flops / timing.median / 1e9:6.1f} GFLOP/s | {bound:7} | "
        f"{floor / timing.median:4.0%} ({floor / timing.best:.0%})",
        flush=True,
    )
    return {
        "op": case.op.name, "dtype": case.dtype, "shape": case.label, "bound": bound,
        "bytes": case.num_bytes, "flops": case.flops, **timing.record(),
        "limit_s": floor, "isa": limits.isa, "threads": limits.num_threads,
    }  # fmt: skip


def better(a: Limits, b: Limits) -> Limits:
    """The higher of two measurements: of a limit, the larger is the truer."""
    flops = {dtype: max(a.flops[dtype], b.flops[dtype]) for dtype in a.flops}
    return Limits(a.isa, a.num_threads, max(a.read_bandwidth, b.read_bandwidth), flops)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="*", help="these alone")
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=["7b"])
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, nargs="*", default=["bfloat16"],
                        help="of weights and cache")  # fmt: skip
    parser.add_argument("--isa", choices=ops.available_isas(), nargs="*", default=[ops.isa()])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 512])
    parser.add_argument("--keys", type=int, nargs="*", default=[512, 16384])
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        ops.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    rows = []
    for isa in args.isa:
        ops.set_isa(isa)
        print(describe(measure_limits()))
        for case in [
            case for shape in args.shape for dtype in args.dtype
            for case in cases(SHAPES[shape], dtype, args.tokens, args.keys)
            if not args.op or case.op.name in args.op
        ]:  # fmt: skip
            check(case, rng)
            before = measure_limits(0.05)
            timing = time_case(case, args.seconds, rng)
            rows.append(row(case, timing, better(before, measure_limits(0.05))))
    save(args.json, rows)


if __name__ == "__main__":
    main()
