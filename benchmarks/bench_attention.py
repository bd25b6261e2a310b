"""Time decode attention over each cache dtype in turn, or many queries against one, as ratios.

    python benchmarks/bench_attention.py [--model 7b] [--keys 100000] [--rounds 20]
    python benchmarks/bench_attention.py --queries 16 --keys 32768

In each round every case runs once, with the read probe before and after it for about as long. A
share is relative to the mean of the two, so that a case and its limit saw the same machine; the
median round counts.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np

from codellama_rt import _core
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench.measure import Timing
from codellama_rt.tools.bench.op_arrays import bind, make_arrays
from codellama_rt.tools.bench.op_cases import Case, Selection
from codellama_rt.tools.bench.op_check import check
from codellama_rt.tools.limits import PROBE_BYTES, probe_memory


def select(model: str, dtypes: list[str], queries: list[int], keys: int) -> list[Case]:
    chosen = Selection(["paged_attention"], [model], dtypes, queries, [keys])
    return list(chosen.cases())


class Probe:
    """Read memory beyond any cache for a given time, and report what the threads read together."""

    def __init__(self):
        self.memory = probe_memory(PROBE_BYTES)

    def __call__(self, seconds: float) -> float:
        started, passes = perf_counter(), 0
        while not passes or perf_counter() - started < seconds:
            _core.read_memory(self.memory)
            passes += 1
        return passes * self.memory.nbytes / (perf_counter() - started)


def measure(cases: list[Case], rounds: int) -> tuple[list[Timing], list[list[float]], list[float]]:
    """Return seconds and shares of the limit of each case, and the probe's measurements."""
    calls, probe, read = [], Probe(), []
    for case in cases:
        arrays = make_arrays(case, np.random.default_rng(0))
        if case.sizes["num_keys"] <= 4096:  # the float64 reference of more takes gigabytes
            check(case, arrays)
        calls.append(bind(case.op, arrays))
        calls[-1]()
    seconds, shares = [[] for _ in calls], [[] for _ in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            length = seconds[i][-1] if seconds[i] else 0.02
            before = probe(length)
            started = perf_counter()
            call()
            seconds[i].append(perf_counter() - started)
            limit = (before + probe(length)) / 2
            shares[i].append(cases[i].num_bytes / seconds[i][-1] / limit)
            read.append(limit)
    return [Timing(times) for times in seconds], shares, read


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
    timings, shares, read = measure(cases, args.rounds)
    low, high = min(read) / 1e9, max(read) / 1e9
    print(f"{args.model}, {args.keys} keys; read {low:.1f} to {high:.1f} GB/s")
    for case, timing, share in zip(cases, timings, shares, strict=True):
        first = timings[0]
        print(
            f"{case.dtype:9} {case.sizes['num_tokens']:3} queries  {timing.text():44}"
            f"{median(share):5.0%} of the read bandwidth (best round {max(share):.0%}); times the "
            f"first row's: {timing.best / first.best:.2f} best, "
            f"{timing.median / first.median:.2f} median"
        )


if __name__ == "__main__":
    main()
