"""What a step costs beside the model: the engine's part, and what AsyncEngine loses.

    python benchmarks/bench_step.py [--sequences 64] [--rounds 5] [--tokenizer DIR]

The model is the tiny one of the tests (one layer, dim 256, vocabulary of 512), so that nearly
everything around it shows. A step is a call of `Engine.step`, outputs and all; with a tokenizer it
makes their text as well. Medians of steps of all sequences; the sides alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.async_engine import AsyncEngine
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.text.tokenizer import Tokenizer, load_tokenizer

MODEL = Path(__file__).parent.parent / "tests/data/tiny/hd128_gqa_bf16"
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.95},
}


def new_engine(model: Llama, num_seqs: int, tokenizer: Tokenizer | None = None) -> Engine:
    """Return an engine with room for all sequences."""
    kv_cache = KVCache(model.config, num_blocks=8 * num_seqs, block_size=64, dtype="float32")
    return Engine(model, kv_cache, tokenizer, max_model_len=512, max_num_seqs=num_seqs)


def request(i: int, max_tokens: int, **settings: float) -> tuple[list[int], SamplingParams]:
    """Return the prompt and parameters of a request."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **settings)
    return [1, 2, 3, 4 + i], params


def step_seconds(
    model: Llama,
    num_seqs: int,
    num_steps: int,
    settings: dict[str, float],
    tokenizer: Tokenizer | None = None,
) -> tuple[float, float]:
    """Return the medians of a step, and of the model's part of it."""
    engine, steps = new_engine(model, num_seqs, tokenizer), []
    for i in range(num_seqs):
        engine.add_request(str(i), *request(i, num_steps, **settings))
    while engine.has_unfinished():
        began, in_model = perf_counter(), engine.steps.totals.model_seconds
        outputs = engine.step()
        seconds = perf_counter() - began
        if len(outputs) == num_seqs:
            steps.append((seconds, engine.steps.totals.model_seconds - in_model))
    whole, its_model = zip(*steps[2:], strict=True)
    return median(whole), median(its_model)


def direct_rate(model: Llama, num_seqs: int, num_tokens: int) -> float:
    """Return the tokens per second of `Engine.step`."""
    engine, began = new_engine(model, num_seqs), perf_counter()
    for i in range(num_seqs):
        engine.add_request(str(i), *request(i, num_tokens))
    while engine.has_unfinished():
        engine.step()
    return num_seqs * num_tokens / (perf_counter() - began)


def async_rate(model: Llama, num_seqs: int, num_tokens: int) -> float:
    """Return the tokens per second of as many streams of an AsyncEngine."""

    async def read(engine: AsyncEngine, i: int) -> None:
        async for _ in engine.generate(*request(i, num_tokens)):
            pass

    async def main() -> float:
        async with AsyncEngine(new_engine(model, num_seqs)) as engine:
            began = perf_counter()
            await asyncio.gather(*(read(engine, i) for i in range(num_seqs)))
            return num_seqs * num_tokens / (perf_counter() - began)

    return asyncio.run(main())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, help="a model's directory: measure text as well")
    args = parser.parse_args()
    checkpoint = open_checkpoint(MODEL)
    model = Llama(checkpoint.config, checkpoint.weights)
    print(f"{ops.isa()}, {ops.num_threads()} threads")
    print("| sequences | settings | step, us | beside the model, us | per sequence | share |")
    print("| --- | --- | --- | --- | --- | --- |")
    tokenizers = {"": None}
    if args.tokenizer is not None:
        tokenizers["; text"] = load_tokenizer(args.tokenizer)
    for (name, settings), (suffix, tokenizer) in product(SETTINGS.items(), tokenizers.items()):
        rounds = [
            step_seconds(model, args.sequences, args.steps, settings, tokenizer)
            for _ in range(args.rounds)
        ]
        step, its_model = min(rounds)  # the round that other programs disturbed least
        rest = step - its_model
        print(
            f"| {args.sequences} | {name}{suffix} | {step * 1e6:.0f} | {rest * 1e6:.0f} | "
            f"{rest / args.sequences * 1e6:.2f} | {rest / step:.1%} |",
            flush=True,
        )
    pairs = [
        (
            direct_rate(model, args.streams, 4 * args.steps),
            async_rate(model, args.streams, 4 * args.steps),
        )
        for _ in range(args.rounds)
    ]
    direct, streams = (max(side) for side in zip(*pairs, strict=True))
    ratios = ", ".join(f"{theirs / ours:.3f}" for ours, theirs in pairs)
    print(
        f"\n{args.streams} streams: Engine.step {direct:.0f} tokens per second, AsyncEngine "
        f"{streams:.0f} ({streams / direct:.3f}; round by round {ratios})"
    )


if __name__ == "__main__":
    sys.exit(main())
