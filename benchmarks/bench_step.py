"""What a step costs beside the model: the engine's part, and what AsyncEngine loses.

    python benchmarks/bench_step.py [--sequences 64] [--rounds 5] [--tokenizer DIR]

The model is the tiny one of the tests (one layer, dim 256, vocabulary of 512), so that nearly
everything around it shows. A step is a call of `Engine.step`, outputs and all; with a tokenizer it
makes their text as well, of whole words (the first ids of a SentencePiece vocabulary are bytes,
which a model that is not random seldom writes). Medians of steps of all sequences; the sides
alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
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
from codellama_rt.text.tokenizer.detokenizer import IncrementalDetokenizer

MODEL = Path(__file__).parent.parent / "tests/data/tiny/hd128_gqa_bf16"
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.95},
}


class Words:
    """A tokenizer whose ids begin behind the bytes of another one."""

    _FIRST = 1000

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the other one."""
        self._tokenizer, self.end_ids = tokenizer, ()

    def filling_end(self, prompt_ids: Sequence[int]) -> None:
        """Return that no prompt asks for a filling."""

    def detokenizer(self, prompt_ids: Sequence[int], **options: bool) -> Words.Detokenizer:
        """Return a decoder that knows the other ids."""
        return self.Detokenizer(self._tokenizer.detokenizer([], **options))

    class Detokenizer:
        """Give another decoder the other ids."""

        def __init__(self, inner: IncrementalDetokenizer) -> None:
            """Take the other decoder."""
            self._push, self.flush = inner.push, inner.flush

        def push(self, token_id: int) -> str:
            """Return the text of a token."""
            return self._push(token_id + Words._FIRST)


def new_engine(
    model: Llama, num_seqs: int, tokenizer: Words | None = None, max_len: int = 512
) -> Engine:
    """Return an engine with room for all sequences."""
    num_blocks = -(-max_len // 64) * num_seqs
    kv_cache = KVCache(model.config, num_blocks=num_blocks, block_size=64, dtype="float32")
    return Engine(model, kv_cache, tokenizer, max_model_len=max_len, max_num_seqs=num_seqs)


def request(i: int, max_tokens: int, **settings: float) -> tuple[list[int], SamplingParams]:
    """Return the prompt and parameters of a request."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **settings)
    return [1, 2, 3, 4 + i], params


def step_seconds(
    model: Llama,
    num_seqs: int,
    num_steps: int,
    settings: dict[str, float],
    tokenizer: Words | None = None,
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


def direct_seconds(model: Llama, num_seqs: int, num_tokens: int) -> float:
    """Return how long `Engine.step` takes for so many tokens of each sequence."""
    engine = new_engine(model, num_seqs, max_len=num_tokens + 64)
    began = perf_counter()
    for i in range(num_seqs):
        engine.add_request(str(i), *request(i, num_tokens))
    while engine.has_unfinished():
        engine.step()
    return perf_counter() - began


def async_seconds(model: Llama, num_seqs: int, num_tokens: int) -> float:
    """Return how long as many streams of an AsyncEngine take."""

    async def read(engine: AsyncEngine, i: int) -> None:
        async for _ in engine.generate(*request(i, num_tokens)):
            pass

    async def main() -> float:
        async with AsyncEngine(new_engine(model, num_seqs, max_len=num_tokens + 64)) as engine:
            began = perf_counter()
            await asyncio.gather(*(read(engine, i) for i in range(num_seqs)))
            return perf_counter() - began

    return asyncio.run(main())


def compare_streams(model: Llama, num_seqs: int, num_tokens: int, rounds: int) -> None:
    """Print what `AsyncEngine` loses against `Engine.step`, in pairs whose order alternates."""
    pairs = []
    for i in range(rounds):
        order = (direct_seconds, async_seconds)[:: 1 if i % 2 else -1]
        seconds = {side: side(model, num_seqs, num_tokens) for side in order}
        pairs.append((seconds[direct_seconds], seconds[async_seconds]))
    rates = [num_seqs * num_tokens / median(side) for side in zip(*pairs, strict=True)]
    ratios = sorted(direct / streams for direct, streams in pairs)
    print(
        f"\n{num_seqs} streams of {num_tokens} tokens: Engine.step {rates[0]:.0f} tokens per "
        f"second, AsyncEngine {rates[1]:.0f}; {median(ratios):.3f} of it, pair by pair "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    )


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
        tokenizers["; text"] = Words(load_tokenizer(args.tokenizer))
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
    compare_streams(model, args.streams, 10 * args.steps, 2 * args.rounds)


if __name__ == "__main__":
    sys.exit(main())
