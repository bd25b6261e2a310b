"""The cost of choosing tokens: `ops.sample` beside its definition in NumPy.

    python benchmarks/bench_sampling.py

The definition is what the engine ran until `ops.sample` replaced it, one row after another. Rows of
logits are normal, with the standard deviation given; a larger one leaves fewer likely tokens. The
two sides alternate; ratios are of the medians of one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.tools.bench.measure import Timing

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.95},
    "temperature, top_k": {"temperature": 0.8, "top_k": 40},
    "temperature, top_k, top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "temperature, min_p": {"temperature": 0.8, "min_p": 0.05},
}


def alternating(sides: list[Callable[[], object]], rounds: int) -> list[Timing]:
    """Time the sides in turn; the first round warms up."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for times, side in zip(seconds, sides, strict=True):
            begin = perf_counter()
            side()
            times.append(perf_counter() - begin)
    return [Timing(times[1:]) for times in seconds]


def main() -> None:
    """Print a row per number of rows and settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,8,64", help="of logits, comma-separated")
    parser.add_argument("--vocab-size", type=int, default=32016)
    parser.add_argument("--scale", type=float, default=2.0, help="standard deviation of the logits")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{ops.isa()}, {ops.num_threads()} threads, vocabulary of {options.vocab_size}")
    print("| rows | settings | NumPy, us per row | ops.sample, us per row | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for num_rows in map(int, options.rows.split(",")):
        shape = num_rows, options.vocab_size
        logits = rng.normal(0, options.scale, shape).astype(np.float32)
        for name, settings in SETTINGS.items():
            sides = [
                lambda one=one, logits=logits, settings=settings: one.sample(logits, **settings)
                for one in (reference, ops)
            ]
            theirs, ours = (t.median / num_rows for t in alternating(sides, options.rounds))
            print(
                f"| {num_rows} | {name} | {theirs * 1e6:.0f} | {ours * 1e6:.1f} | "
                f"{theirs / ours:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
