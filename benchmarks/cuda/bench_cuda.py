"""Measure one step of `run.sh` on the device, and print the table of all of them.

    python benchmarks/cuda/bench_cuda.py STEP --rows FILE [--seconds 60] [--smoke] [--module PATH]
    python benchmarks/cuda/bench_cuda.py table --rows FILE

A step is a process of its own: one that hangs or breaks the device does not reach the next. Its
rows are appended to FILE as soon as they are known, and are shares of the roofs found there. Times
are CUDA events around graph replays over more memory than the L2 cache holds, medians with deciles;
the whole model is timed by the caller's clock. `peers` times other libraries' attention on the same
memory, in turn with ours: FlashInfer, FlashAttention-3 and torch's SDPA, if they can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cuda_cases import (
    COPY,
    FULL,
    HEAD_DIM,
    READ,
    SMOKE,
    DecodeCase,
    Sizes,
    linear_rows,
    roof_rows,
    rope_rows,
    row,
)
from cuda_model import CASES, SMOKE_CASES, model_rows
from cuda_peers import decode_peers, prefill_peers
from cuda_timing import Graph, Row, Work, random_tensor, timed

from codellama_rt.model.cuda import ops
from codellama_rt.model.cuda.tensor import Memory, empty, to_device
from codellama_rt.ops import native

WORKSPACE_BYTES = 512 << 20


@dataclass(frozen=True)
class Run:
    """What a step is given: sizes, the roofs measured before it, and whether its time is up."""

    sizes: Sizes
    smoke: bool
    roofs: dict[str, float]  # bytes per second; 0: not measured
    out_of_time: Callable[[], bool]
    rng: np.random.Generator


def decode(run: Run, dtype: str, *, warps: int = 4, batches: Iterable[int] = (1,)) -> Iterator[Row]:
    """Yield rows of paged_attention with one token per sequence, the longest first.

    Args:
        run: the step's.
        dtype: of the cache.
        warps: per block, over int8 and fp8: 4 with 6 stages each, or 8 with 3.
        batches: numbers of sequences.
    """
    native.cuda().set_decode_warps(warps)
    who = "ours" if warps == 4 else f"ours, {warps} warps"
    for what, case in decode_cases(run, dtype, batches):
        timing = timed({who: Graph(case.run)}, run.sizes.repeats, case.copies)[who]
        yield row(what, who, timing, case.kv_bytes, "TB/s", run.roofs[READ], READ)


def decode_cases(
    run: Run, dtype: str, batches: Iterable[int] = (1,)
) -> Iterator[tuple[str, DecodeCase]]:
    """Yield the shapes that fit the memory, with what they are called, while there is time."""
    shapes = [
        (batch, length, heads)
        for batch in batches
        for length in reversed(run.sizes.lengths)
        for heads in run.sizes.heads
    ]
    for batch, length, heads in shapes:
        what = f"decode {heads[0]}/{heads[1]}, batch {batch}, {length} tokens, {dtype}"
        if run.out_of_time():
            print(f"no time for {what}", flush=True)
        elif 4 * batch * length * heads[1] * HEAD_DIM <= run.sizes.most_bytes:
            yield what, DecodeCase(run.rng, heads, length, batch, dtype, run.sizes)


def prefill(run: Run, *, peers: bool = False) -> Iterator[Row]:
    """Yield the rows of causal flash_attention of one sequence."""
    for length in reversed(run.sizes.prefill):
        heads = run.sizes.heads[0][0]
        what = f"prefill {heads}/{heads}, {length} tokens, causal, bfloat16"
        if run.out_of_time():
            print(f"no time for {what}", flush=True)
            continue
        tensors = [random_tensor(run.rng, (length, heads, HEAD_DIM)) for _ in range(3)]
        out = empty((length, heads, HEAD_DIM), "bfloat16"), empty((length, heads), "float32")
        bounds = to_device(np.array([0, length], np.int32))
        contenders: dict[str, Work] = {
            "ours": Graph(lambda t=tensors, b=bounds, o=out: ops.flash_attention(*t, b, b, out=o))
        }
        if peers:
            contenders |= prefill_peers(tensors, out[0])
        for who, timing in timed(contenders, run.sizes.repeats).items():
            yield row(what, who, timing, 2 * length * length * heads * HEAD_DIM, "TFLOP/s")


def beside_peers(run: Run) -> Iterator[Row]:
    """Yield decoding and prefill in bfloat16, in turn with other libraries'."""
    for what, case in decode_cases(run, "bfloat16"):
        contenders = {"ours": Graph(case.run), **decode_peers(case)}
        for who, timing in timed(contenders, run.sizes.repeats, case.copies).items():
            yield row(what, who, timing, case.kv_bytes, "TB/s", run.roofs[READ], READ)
    yield from prefill(run, peers=True)


def bits(run: Run) -> Iterator[Row]:
    """Yield how many bits of a chunk (wgmma) its queries' own steps (mma.sync) give, and again."""
    length, queries, repeats = (300, 20, 3) if run.smoke else (5000, 200, 50)
    case = DecodeCase(run.rng, (8, 2), length, 1, "bfloat16", run.sizes)
    query = random_tensor(run.rng, (queries, 8, HEAD_DIM))

    def attend(first: int, end: int) -> np.ndarray:
        lens = to_device(np.array([length - queries + end], np.int32))
        bounds = to_device(np.array([0, end - first], np.int32))
        rows = query.rows(first, end), *case.caches[0], case.on_device, lens, bounds
        return ops.paged_attention(*rows)[0].numpy().view(np.uint16)

    steps = np.concatenate([attend(i, i + 1) for i in range(queries)])
    equal = float(np.mean(attend(0, queries) == steps))
    yield Row("elements of a chunk equal to those of steps", "ours", 0, 0, 0, equal, "of 1")
    equal = float(np.mean([np.array_equal(attend(0, 1), steps[:1]) for _ in range(repeats)]))
    yield Row(f"{repeats} repeated steps equal to the first", "ours", 0, 0, 0, equal, "of 1")


def model(run: Run, name: str) -> Iterable[Row]:
    """Return the rows of a whole model of 7B's shape."""
    return model_rows((SMOKE_CASES if run.smoke else CASES)[name], run.out_of_time)


STEPS: dict[str, Callable[[Run], Iterable[Row]]] = {
    "roofs": lambda run: roof_rows(run.sizes),
    "decode-bfloat16": lambda run: decode(run, "bfloat16"),
    "decode-fp8": lambda run: decode(run, "fp8"),
    "decode-int8": lambda run: decode(run, "int8"),
    "decode-fp8-8-warps": lambda run: decode(run, "fp8", warps=8),
    "decode-int8-8-warps": lambda run: decode(run, "int8", warps=8),
    "decode-batches": lambda run: decode(run, "bfloat16", batches=run.sizes.batches[1:]),
    "prefill": prefill,
    "linear": lambda run: linear_rows(run.rng, run.sizes, run.roofs[READ]),
    "rope": lambda run: rope_rows(run.rng, run.sizes, run.roofs[COPY]),
    "model-bf16": lambda run: model(run, "model-bf16"),
    "model-int8-fp8": lambda run: model(run, "model-int8-fp8"),
    "bits": bits,
    "peers": beside_peers,
}


def read_rows(path: Path) -> list[dict]:
    """Return what the steps so far have written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_step(name: str, path: Path, *, smoke: bool, seconds: float) -> None:
    """Measure a step, and append each row as soon as it is known."""
    usable, text = native.available("cuda")
    if not usable:
        sys.exit(f"bench_cuda: {text}")
    module, deadline = native.cuda(), time.monotonic() + seconds
    print(f"{name} on {text}", flush=True)
    workspace = Memory((8 << 20) if smoke else WORKSPACE_BYTES)
    module.set_stream(module.create_stream())
    module.set_workspace(workspace.pointer, workspace.num_bytes)
    found = {r["what"]: 1e12 * r["rate"] for r in read_rows(path) if r.get("who") == "device"}
    roofs = {roof: found.get(roof, 0) for roof in (READ, COPY)}
    run = Run(
        SMOKE if smoke else FULL,
        smoke,
        roofs,
        lambda: time.monotonic() > deadline,
        np.random.default_rng(0),
    )
    with path.open("a") as file:
        for one in STEPS[name](run):
            print(json.dumps(asdict(one)), file=file, flush=True)
    module.set_workspace(0, 0)


def table(rows: list[dict]) -> str:
    """Return Markdown: what failed, and the rows, with the speed relative to the best peer."""
    best: dict[str, float] = {}
    measured = [one for one in rows if "what" in one]
    for one in measured:
        if not one["who"].startswith("ours"):
            best[one["what"]] = min(best.get(one["what"], one["us"]), one["us"])
    lines = [
        f"{one['step']}: {one['outcome']} after {one['seconds']} s\n"
        for one in rows
        if one.get("outcome", "passed") != "passed"
    ]
    lines += [
        "| what | who | median us (p10-p90) | rate | of the limit | times the best peer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in measured:
        share = f"{one['share']:.0%} of {one['of']}" if one["share"] is not None else ""
        ours = one["who"].startswith("ours") and one["what"] in best
        ratio = f"{best[one['what']] / one['us']:.2f}" if ours else ""
        lines.append(
            f"| {one['what']} | {one['who']} | {one['us']:.1f} ({one['p10']:.1f}-{one['p90']:.1f})"
            f" | {one['rate']:.3g} {one['unit']} | {share} | {ratio} |"
        )
    return "\n".join(lines)


def use_module(path: Path) -> None:
    """Take this module for the device's: the emulator, in a dry run."""
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["codellama_rt._cuda"] = module


def main(arguments: list[str] | None = None) -> None:
    """Measure a step, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[*STEPS, "table"])
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: check that it runs")
    parser.add_argument("--module", type=Path, help="of the device, if not the package's own")
    args = parser.parse_args(arguments)
    if args.module:
        use_module(args.module)
    if args.step == "table":
        print(table(read_rows(args.rows)))
    else:
        run_step(args.step, args.rows, smoke=args.smoke, seconds=args.seconds)


if __name__ == "__main__":
    main()
