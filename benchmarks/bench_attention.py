"""Decode attention over each cache dtype in turns, and many queries against one: ratios of one run.

    python benchmarks/bench_attention.py [--model 7b] [--keys 100000] [--rounds 20]
    python benchmarks/bench_attention.py --queries 16 --keys 32768

A round runs every case once with the read probe between; shares are of the probe's best pass.
"""

import argparse
from time import perf_counter

import numpy as np

from codellama_rt.bench.measure import Timing
from codellama_rt.bench.op_arrays import bind, make_arrays
from codellama_rt.bench.op_cases import Case, Selection
from codellama_rt.bench.op_check import check
from codellama_rt.bench.shapes import SHAPES
from codellama_rt.limits import read_bandwidth

PROBE_SECONDS = 0.02


def select(model: str, dtypes: list[str], queries: list[int], keys: int) -> list[Case]:
    chosen = Selection(["paged_attention"], [model], dtypes, queries, [keys])
    return list(chosen.cases())


def measure(cases: list[Case], rounds: int) -> tuple[list[Timing], float]:
    calls = []
    for case in cases:
        arrays = make_arrays(case, np.random.default_rng(0))
        if case.sizes["num_keys"] <= 4096:  # the float64 oracle of more takes gigabytes
            check(case, arrays)
        calls.append(bind(case.op, arrays))
        calls[-1]()
    seconds, read = [[] for _ in calls], 0.0
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            read = max(read, read_bandwidth(PROBE_SECONDS))
            started = perf_counter()
            call()
            times.append(perf_counter() - started)
    return [Timing(times) for times in seconds], read


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--dtypes", default="bfloat16,float16,int8,int4")
    parser.add_argument("--queries", type=int, default=1, help="compare this many with one")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    dtypes = args.dtypes.split(",")
    cases = select(args.model, dtypes, sorted({1, args.queries}), args.keys)
    timings, read = measure(cases, args.rounds)
    print(f"{args.model}, {args.keys} keys; read {read / 1e9:.1f} GB/s")
    for case, timing in zip(cases, timings, strict=True):
        first = timings[0]
        print(
            f"{case.dtype:9} {case.sizes['num_tokens']:3} queries  {timing.text():44}"
            f"{case.num_bytes / timing.best / read:5.0%} of the probe at best, "
            f"{case.num_bytes / timing.median / read:4.0%} median; time over the first row's "
            f"{timing.best / first.best:.2f} best, {timing.median / first.median:.2f} median"
        )


if __name__ == "__main__":
    main()
