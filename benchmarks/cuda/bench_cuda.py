"""Time the device's kernels and a whole model, beside limits of the same run and beside peers.

    python benchmarks/cuda/bench_cuda.py [--seconds 240] [--out FOLDER] [--section NAME] [--smoke]

Each section runs in its own process with a time limit: one that hangs or breaks the device does not
affect the others. Within a section all contenders run in turn, in one process, on the same memory:
peers are FlashInfer, FlashAttention-3 and torch's SDPA, if their wheels can be imported. Times are
CUDA events around graph replays over more memory than the L2 cache holds, medians with deciles; the
whole model is timed by the caller's clock. Results go to FOLDER/cuda_bench.json as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from cuda_cases import (
    FULL,
    HEAD_DIM,
    SMOKE,
    DecodeCase,
    Sizes,
    linear_rows,
    roofs,
    rope_rows,
    row,
)
from cuda_model import CASES, SMOKE_CASES, model_rows
from cuda_peers import decode_peers, prefill_peers
from cuda_timing import Graph, Row, random_tensor, timed

from codellama_rt.model.cuda import ops
from codellama_rt.model.cuda.tensor import Memory, empty, to_device
from codellama_rt.ops import native

WORKSPACE_BYTES = 512 << 20
# name -> its share of the time
SECTIONS = {"small": 2, "decode": 9, "prefill": 3, "model-bf16": 4, "model-int8-fp8": 3}
FILE = "cuda_bench.json"
OutOfTime = Callable[[], bool]


def small_section(rng: np.random.Generator, sizes: Sizes, _: OutOfTime) -> Iterator[Row]:
    """Yield the rows of rope_and_cache and linear."""
    limits = roofs(sizes)
    yield from _limit_rows(limits, sizes)
    yield from rope_rows(rng, sizes, limits["copy roof"])
    yield from linear_rows(rng, sizes, limits["read roof"])


def _limit_rows(limits: dict[str, float], sizes: Sizes) -> Iterator[Row]:
    for name, rate in limits.items():
        us = sizes.roof_bytes / rate * 1e6
        yield Row(
            f"{name}, {sizes.roof_bytes >> 20} MiB", "device", us, us, us, rate / 1e12, "TB/s"
        )


def decode_section(rng: np.random.Generator, sizes: Sizes, out_of_time: OutOfTime) -> Iterator[Row]:
    """Yield rows of paged_attention with one token per sequence, batch 1 of each shape first."""
    roof = roofs(sizes)["read roof"]
    shapes = [
        (heads, length, batch, dtype)
        for batch in sizes.batches
        for length in reversed(sizes.lengths)
        for heads in sizes.heads
        for dtype in ("bfloat16", "fp8", "int8")
    ]
    for heads, length, batch, dtype in shapes:
        what = f"decode {heads[0]}/{heads[1]}, batch {batch}, {length} tokens, {dtype}"
        if out_of_time():
            print(f"no time for {what}", flush=True)
        elif 4 * batch * length * heads[1] * HEAD_DIM <= sizes.most_bytes:
            case = DecodeCase(rng, heads, length, batch, dtype, sizes)
            yield from decode_rows(what, case, sizes, roof)
            del case  # free its memory before the next one's


def decode_rows(what: str, case: DecodeCase, sizes: Sizes, roof: float) -> list[Row]:
    """Return the rows of one shape, for every contender that supports it."""
    contenders = {"ours": Graph(case.run)}
    if case.cache_dtype == "bfloat16":
        contenders |= decode_peers(case)
    timings = timed(contenders, sizes.repeats, case.copies)
    return [
        row(what, who, timing, case.kv_bytes, "TB/s", roof, "read roof")
        for who, timing in timings.items()
    ]


def prefill_section(
    rng: np.random.Generator, sizes: Sizes, out_of_time: OutOfTime
) -> Iterator[Row]:
    """Yield the rows of causal flash_attention of one sequence."""
    for length in reversed(sizes.prefill):
        heads = sizes.heads[0][0]
        what = f"prefill {heads}/{heads}, {length} tokens, causal, bfloat16"
        if out_of_time():
            print(f"no time for {what}", flush=True)
            continue
        tensors = [random_tensor(rng, (length, heads, HEAD_DIM)) for _ in range(3)]
        out = empty((length, heads, HEAD_DIM), "bfloat16"), empty((length, heads), "float32")
        bounds = to_device(np.array([0, length], np.int32))
        work = Graph(lambda t=tensors, b=bounds, o=out: ops.flash_attention(*t, b, b, out=o))
        contenders = {"ours": work, **prefill_peers(tensors, out[0])}
        for who, timing in timed(contenders, sizes.repeats).items():
            yield row(what, who, timing, 2 * length * length * heads * HEAD_DIM, "TFLOP/s")


def section_rows(name: str, smoke: bool, seconds: float) -> Iterator[Row]:
    """Run one section in this process, until its time is up."""
    deadline = time.monotonic() + seconds
    sizes = SMOKE if smoke else FULL
    rng = np.random.default_rng(0)

    def out_of_time() -> bool:
        return time.monotonic() > deadline

    if name.startswith("model"):
        return iter(model_rows((SMOKE_CASES if smoke else CASES)[name], out_of_time))
    sections = {"small": small_section, "decode": decode_section, "prefill": prefill_section}
    return sections[name](rng, sizes, out_of_time)


def run_section(name: str, folder: Path, *, smoke: bool, seconds: float) -> None:
    """Measure a section; each row is written as soon as it is known."""
    usable, text = native.available("cuda")
    if not usable:
        sys.exit(f"bench_cuda: {text}")
    module = native.cuda()
    print(f"== {name}: {text}", flush=True)
    stream, workspace = module.create_stream(), Memory((8 << 20) if smoke else WORKSPACE_BYTES)
    ops.set_stream(stream)
    module.set_workspace(workspace.pointer, workspace.num_bytes)
    with (folder / f"{name}.jsonl").open("w") as file:
        for one in section_rows(name, smoke, seconds):
            print(json.dumps(asdict(one)), file=file, flush=True)
    module.set_workspace(0, 0)


def run_all(command: list[str], folder: Path, seconds: float) -> list[str]:
    """Run every section in its own process and return failures as text.

    Args:
        command: gets `--section NAME --seconds S` appended.
        folder: for results.
        seconds: for all sections; unused time goes to the next.
    """
    faults, end, parts = [], time.monotonic() + seconds, sum(SECTIONS.values())
    for name, part in SECTIONS.items():
        limit = max(1.0, end - time.monotonic()) * part / parts
        parts -= part
        asked = [*command, "--section", name, "--seconds", f"{0.8 * limit:.1f}"]
        try:
            result = subprocess.run(asked, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            faults.append(f"{name}: stopped after {limit:.0f} s")
            continue
        if result.returncode:
            faults.append(f"{name}: exit status {result.returncode}")
    rows = [
        json.loads(line)
        for name in SECTIONS
        if (folder / f"{name}.jsonl").is_file()
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]
    (folder / FILE).write_text(json.dumps({"rows": rows, "faults": faults}, indent=1))
    print(table(rows), flush=True)
    return faults


def table(rows: list[dict]) -> str:
    """Return a Markdown table with the speed relative to the best peer of the same shape."""
    best: dict[str, float] = {}
    for one in rows:
        if not one["who"].startswith("ours"):
            best[one["what"]] = min(best.get(one["what"], one["us"]), one["us"])
    lines = [
        "| what | who | median us (p10-p90) | rate | of the limit | times the best peer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        share = f"{one['share']:.0%} of {one['of']}" if one["share"] is not None else ""
        ours = one["who"].startswith("ours") and one["what"] in best
        ratio = f"{best[one['what']] / one['us']:.2f}" if ours else ""
        lines.append(
            f"| {one['what']} | {one['who']} | {one['us']:.1f} ({one['p10']:.1f}-{one['p90']:.1f})"
            f" | {one['rate']:.3g} {one['unit']} | {share} | {ratio} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure one section here, or all sections in their own processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, default=Path("build/cuda_bench"), metavar="FOLDER")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: check that it runs")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        return run_section(args.section, args.out, smoke=args.smoke, seconds=args.seconds)
    command = [sys.executable, __file__, "--out", str(args.out), *["--smoke"] * args.smoke]
    faults = run_all(command, args.out, args.seconds)
    if faults:
        sys.exit("\n".join(faults))
    return None


if __name__ == "__main__":
    main()
