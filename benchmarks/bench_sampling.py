"""The cost of choosing tokens: `ops.sample` beside its definition in NumPy.

    python benchmarks/bench_sampling.py

The definition is what the engine ran until `ops.sample` replaced it, one row after another. Rows of
logits are normal, with the standard deviation given; a larger one leaves fewer likely tokens. The
sides alternate; ratios are of the medians of one run. Penalties and biases are of 32 tokens per
row, and masks allow half of the tokens, at random. The limit of each row is reading its logits
once, by all threads and from where they lie (in the cache, as after a model's step).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.native import _core
from codellama_rt.tools.bench.measure import Timing

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.95},
    "temperature, top_k": {"temperature": 0.8, "top_k": 40},
    "temperature, top_k, top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "temperature, min_p": {"temperature": 0.8, "min_p": 0.05},
    "temperature, penalties": {"temperature": 0.8, "seen": 1, "repetition_penalty": 1.1},
    "temperature, bias": {"temperature": 0.8, "bias": 1},
    "temperature, mask": {"temperature": 0.8, "masks": 1},
    "greedy, penalties": {"temperature": 0.0, "seen": 1, "repetition_penalty": 1.1},
    "greedy, bias": {"temperature": 0.0, "bias": 1},
    "greedy, mask": {"temperature": 0.0, "masks": 1},
}
_LISTED = 32  # tokens per row


def lists_and_masks(
    rng: np.random.Generator, num_rows: int, vocab_size: int
) -> dict[str, ops.TokenLists | np.ndarray]:
    """Return what the settings that are 1 stand for, by name."""
    offsets = np.arange(num_rows + 1, dtype=np.int32) * _LISTED
    ids = [rng.choice(vocab_size, _LISTED, replace=False) for _ in range(num_rows)]
    token_ids = np.concatenate(ids).astype(np.int32)
    return {
        "seen": ops.TokenLists(offsets, token_ids, np.ones(len(token_ids), np.int32)),
        "bias": ops.TokenLists(offsets, token_ids, np.full(len(token_ids), 0.5)),
        "masks": rng.integers(0, 2**32, (num_rows, -(-vocab_size // 32)), dtype=np.uint32),
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
    print("| rows | settings | NumPy | ops.sample | reading the logits, us per row | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_rows in map(int, options.rows.split(",")):
        shape = num_rows, options.vocab_size
        logits = rng.normal(0, options.scale, shape).astype(np.float32)
        listed = lists_and_masks(rng, num_rows, options.vocab_size)
        for name, settings in SETTINGS.items():
            settings = settings | {key: listed[key] for key in settings if key in listed}
            sides = [
                lambda one=one, logits=logits, settings=settings: one.sample(logits, **settings)
                for one in (reference, ops)
            ]
            sides.append(lambda logits=logits: _core.read_memory(logits))
            theirs, ours, reading = (
                timing.median / num_rows * 1e6 for timing in alternating(sides, options.rounds)
            )
            print(
                f"| {num_rows} | {name} | {theirs:.0f} | {ours:.1f} | {reading:.1f} | "
                f"{theirs / ours:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
