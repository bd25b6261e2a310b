"""Decode and prefill speed of a model at any context, and what Python takes of a step.

    python benchmarks/bench_generate.py --shape 7b --layers 4 --depth 512 16384 --prefill 512
    python benchmarks/bench_generate.py --model smollm2-135m-instruct --depth 512

A context is not computed but made up: the pages hold noise and the prompt's steps are left out.
Speed does not depend on the values; reads and arithmetic of the decode steps are the real ones.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from limits import describe
from measure import Timing, save
from runner import Runner
from shapes import SHAPES
from synthetic import write_directory

from codellama_rt import ops
from codellama_rt.dtypes import FLOAT_DTYPES
from codellama_rt.limits import Limits, measure_limits, read_bandwidth


def decode_row(runner: Runner, depth: int, steps: int, limits: Limits) -> dict:
    """Decode steps at one depth, beside the read bandwidth before and after them."""
    runner.decode(depth, 2)  # warms up caches, threads and the weights' pages
    before = read_bandwidth()
    steps_s, kernels_s = runner.decode_and_replay(depth, steps)
    roof = max(before, read_bandwidth())
    whole = Timing(steps_s)
    python = median(1 - k / s for s, k in zip(steps_s, kernels_s, strict=True))  # pairs: no drift
    num_bytes = runner.decode_bytes(depth)
    row = {
        "what": "decode", "depth": depth, **whole.record(), "bytes": num_bytes,
        "tokens_per_s": 1 / whole.best, "bytes_per_s": num_bytes / whole.best,
        "read_bandwidth": roof, "python_share": python,
    }  # fmt: skip
    print(
        f"decode  depth {depth:>6} | {whole.text()} | {row['tokens_per_s']:.2f} tok/s | "
        f"{row['bytes_per_s'] / 1e9:.1f} GB/s, {row['bytes_per_s'] / roof:.0%} of "
        f"{roof / 1e9:.1f} | Python {python:.1%}",
        flush=True,
    )
    return row | {"isa": limits.isa, "threads": limits.num_threads}


def prefill_row(runner: Runner, num_tokens: int, repeats: int, limits: Limits) -> dict:
    """Prompts of one length, beside the arithmetic of the weights' dtype."""
    runner.prefill(num_tokens)
    timing = Timing([runner.prefill(num_tokens) for _ in range(repeats)])
    rate = runner.prefill_flops(num_tokens) / timing.best
    peak = limits.flops[runner.config.dtype]
    print(
        f"prefill tokens {num_tokens:>5} | {timing.text()} | "
        f"{num_tokens / timing.best:.1f} tok/s | {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of "
        f"{peak / 1e9:.0f} ({runner.config.dtype})",
        flush=True,
    )
    return {
        "what": "prefill", "tokens": num_tokens, **timing.record(),
        "tokens_per_s": num_tokens / timing.best, "flops_per_s": rate, "peak_flops": peak,
        "isa": limits.isa, "threads": limits.num_threads,
    }  # fmt: skip


def open_model(args: argparse.Namespace, folder: str) -> str:
    """The model asked for: one that exists, or a synthetic one written into `folder`."""
    if args.model:
        return args.model
    config = replace(SHAPES[args.shape], dtype=args.dtype)
    config = replace(config, n_layers=args.layers or config.n_layers)
    path = Path(folder) / f"{args.shape}-{config.n_layers}l"
    write_directory(path, config)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="directory, GGUF file or name")
    which.add_argument("--shape", choices=SHAPES, help="random weights in a Code Llama's shape")
    parser.add_argument("--layers", type=int, help="of --shape; the full model's by default")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="bfloat16", help="of --shape")
    parser.add_argument("--kv-dtype", choices=("auto", *FLOAT_DTYPES), default="auto")
    parser.add_argument("--depth", type=int, nargs="*", default=[512])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=32, help="decode steps a depth")
    parser.add_argument("--repeats", type=int, default=5, help="prompts a length")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        ops.set_num_threads(args.threads)
    limits = measure_limits()
    print(describe(limits))
    with tempfile.TemporaryDirectory() as folder:
        path = open_model(args, folder)
        runner = Runner(path, max([*args.depth, *args.prefill]), args.kv_dtype)
        rows = [decode_row(runner, depth, args.steps, limits) for depth in args.depth]
        rows += [prefill_row(runner, count, args.repeats, limits) for count in args.prefill]
    save(args.json, rows)


if __name__ == "__main__":
    main()
