"""Whole prompts of any length, summed from measured chunks: hours in minutes.

    python benchmarks/bench_prefill.py [--model 7b] [--weights bfloat16,int8] [--kv-dtype int8]
    python benchmarks/bench_prefill.py --isa avx512,avx512_bf16 --tokens 4096,100000

A prompt is computed in chunks of 512 tokens. The matrix products of a layer take the same time in
each chunk, and attention's time is linear in the tokens before it, so that it is measured at some
depths and a line through these gives all others. Each layer counts in full; the norms, the rotation
and the head, under 2 % together, do not count. The limit is the time of the same products at the
rate of the fastest instruction that can do them.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scripts import follow, names, new_parser, numbers, parsed

from codellama_rt import ops
from codellama_rt.llm.variants import SHAPES
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.tools.bench.measure import Row, drift, seconds_of
from codellama_rt.tools.bench.op_arrays import bind, make_arrays
from codellama_rt.tools.bench.op_cases import Case, Selection
from codellama_rt.tools.bench.op_check import check
from codellama_rt.tools.limits import measure_limits, peak

CHUNK = 512  # tokens
CHECKED_KEYS = 4096  # the float64 reference of more takes gigabytes
QUICK = {"model": "tiny", "tokens": [1024, 2048], "depths": [512, 1024], "repeats": 1}


@dataclass(frozen=True)
class Part:
    """What the products of one chunk take in one layer, as a line over the tokens of context.

    Attributes:
        seconds: (at no context, per token of context).
        flops: the same of multiplications and additions.
        instruction: the fastest that can do them.
        rate: of that instruction, operations per second.
        roof_drift: how far the rate moved while the part was measured.
    """

    seconds: np.ndarray
    flops: np.ndarray
    instruction: str
    rate: float
    roof_drift: float

    def total(self, line: np.ndarray, ends: np.ndarray) -> float:
        """Return the sum of seconds or FLOPs over chunks that end at these tokens."""
        return float(line[0] * len(ends) + line[1] * ends.sum())


def linears(model: str, weights: str, repeats: int) -> Part:
    """Measure the matrix products of one layer for one chunk."""
    chosen = Selection(["linear"], [model], [weights], [CHUNK], [])
    cases = [case for case in chosen.cases() if not case.label.startswith("lm_head")]
    return _part([(0, cases)], weights, repeats)


def attention(model: str, kv_dtype: str, depths: Sequence[int], repeats: int) -> Part:
    """Measure the attention of one layer for a chunk that ends at each of the depths."""
    chosen = Selection(["paged_attention"], [model], [kv_dtype], [CHUNK], depths)
    return _part([(c.sizes["num_keys"], [c]) for c in chosen.cases()], kv_dtype, repeats)


def prompt_row(
    model: str, num_tokens: int, weights: str, kv_dtype: str, products: Part, attending: Part
) -> Row:
    """Return the row of a whole prompt; a last chunk that is not full counts by its share."""
    layers = SHAPES[model].n_layers
    full = np.arange(CHUNK, num_tokens + 1, CHUNK, dtype=float)
    rest = (num_tokens % CHUNK) / CHUNK

    def total(part: Part, line: np.ndarray) -> float:
        last = part.total(line, np.array([float(num_tokens)]))
        return layers * (part.total(line, full) + rest * last)

    parts = (products, attending)
    seconds, flops = ([total(p, line(p)) for p in parts] for line in (_seconds, _flops))
    floor = sum(work / part.rate for work, part in zip(flops, parts, strict=True))
    return {
        "what": "prompt",
        "model": model,
        "layers": layers,
        "weights": weights,
        "kv": kv_dtype,
        "isa": ops.isa(),
        "threads": ops.num_threads(),
        "tokens": num_tokens,
        "seconds": sum(seconds),
        "hours": sum(seconds) / 3600,
        "tokens_per_s": num_tokens / sum(seconds),
        "attention_share": seconds[1] / sum(seconds),
        "linear_gflop_per_s": flops[0] / seconds[0] / 1e9,
        "attention_gflop_per_s": flops[1] / seconds[1] / 1e9,
        "linear_instruction": products.instruction,
        "attention_instruction": attending.instruction,
        "linear_peak_gflop_per_s": products.rate / 1e9,
        "attention_peak_gflop_per_s": attending.rate / 1e9,
        "limit_seconds": floor,
        "share": floor / sum(seconds),
        "roof_drift": max(part.roof_drift for part in parts),
    }


def prompt_rows(args: argparse.Namespace) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows as (done, total, row); each part is measured once per instruction set."""
    total = len(args.isa) * len(args.weights) * len(args.kv_dtype) * len(args.tokens)
    done, before = 0, ops.isa()
    try:
        for isa in args.isa:
            ops.set_isa(isa)
            products = {w: linears(args.model, w, args.repeats) for w in args.weights}
            for kv in args.kv_dtype:
                attending = attention(args.model, kv, args.depths, args.repeats)
                for weights in args.weights:
                    for count in args.tokens:
                        done += 1
                        row = prompt_row(
                            args.model, count, weights, kv, products[weights], attending
                        )
                        yield done, total, row
    finally:
        ops.set_isa(before)


def _seconds(part: Part) -> np.ndarray:
    return part.seconds


def _flops(part: Part) -> np.ndarray:
    return part.flops


def _part(groups: Sequence[tuple[int, list[Case]]], dtype: str, repeats: int) -> Part:
    """Time groups of cases, each at a number of tokens of context, and lay a line through them."""
    products = dtype if dtype in FLOAT_DTYPES else "int8"
    _, before = peak(products)
    at = [float(depth) for depth, _ in groups]
    seconds = [sum(_time(case, repeats) for case in cases) for _, cases in groups]
    instruction, after = peak(products)
    flops = [float(sum(case.flops for case in cases)) for _, cases in groups]
    lines = (_line(at, seconds), _line(at, flops))
    return Part(*lines, instruction, max(before, after), drift(before, after))


def _line(at: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """Return the (constant, slope) of least squares; one point is a constant."""
    if len(at) == 1:
        return np.array([values[0], 0.0])
    slope, constant = np.polyfit(at, values, 1)
    return np.array([constant, slope])


def _time(case: Case, repeats: int) -> float:
    """Return the shortest run of an operator, checked unless its context is long."""
    arrays = make_arrays(case, np.random.default_rng(0))
    if case.sizes.get("num_keys", 0) <= CHECKED_KEYS:
        check(case, arrays)
    call = bind(case.op, arrays)
    call()
    seconds = min(seconds_of(call) for _ in range(repeats))
    del arrays, call
    gc.collect()
    return seconds


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=SHAPES, default="7b")
    add("--isa", type=names, default=[ops.isa()], metavar="LIST", help="instruction sets")
    add("--weights", type=names, default=["bfloat16"], metavar="LIST", help="dtypes")
    add("--kv-dtype", type=names, default=["bfloat16"], metavar="LIST", help="of the cache")
    add("--tokens", type=numbers, default=[4096, 16384, 32768, 100_000], metavar="LIST",
        help="of the prompts")  # fmt: skip
    add("--depths", type=numbers, default=[4096, 32768], metavar="LIST",
        help="where attention is measured")  # fmt: skip
    add(
        "--repeats", type=int, default=3, metavar="N", help="runs of each operator; the best counts"
    )
    add("--threads", type=int, metavar="N", help="of each operator")
    args = parsed(parser, words, QUICK)
    if min(args.depths) < CHUNK or len(set(args.depths)) < 2:
        parser.error(f"--depths must be at least two, of at least {CHUNK} tokens")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.threads is not None:
        ops.set_num_threads(args.threads)
    print(measure_limits().describe(), file=sys.stderr, flush=True)
    follow("prefill", prompt_rows(args), args.json)


if __name__ == "__main__":
    main()
