"""Speculation against one token at a time: editing tasks made from HumanEval, and noise.

Tokens per second with `speculation="suffix"` over those without it, one request at a time; the two
take turns, task after task. What the model would write is scripted: its logits are computed, and
then the token of the script is made the likeliest. So the acceptance is that of the task, whatever
the weights are:

    copy   the function as it is in the prompt
    edit   the function with another name, wherever it occurs
    other  the function of another problem: little repeats
    noise  random tokens, each once: nothing repeats
    free   what the model itself writes after the editing prompt (models with weights only)

    python benchmarks/bench_speculation.py                              # SmolLM2 as of the README
    python benchmarks/bench_speculation.py --shape 7b --layers 4 --weights bfloat16,int8,int4
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from scripts import follow, names, new_parser, parsed

from codellama_rt import LLM
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.tools.bench.generate_rows import Model
from codellama_rt.tools.bench.measure import Row
from codellama_rt.tools.evaluation.humaneval import read_problems
from codellama_rt.tools.limits import measure_limits

NAMED = "smollm2-135m-instruct"
SIDES = (None, "suffix")
QUICK = {"tasks": 2, "layers": 1, "weights": ["int8"]}


@dataclass(frozen=True)
class Task:
    """A prompt and what follows it; no answer: whatever the model writes."""

    kind: str
    prompt: list[int]
    answer: list[int] | None
    max_tokens: int


class Scripted:
    """A model that computes, and then writes what it is told."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.script = np.zeros(0, np.int32)  # by position; -1: its own

    def follow(self, task: Task) -> None:
        answer = [] if task.answer is None else task.answer
        self.script = np.array([-1] * len(task.prompt) + answer, np.int32)

    def forward(self, batch: object, kv_cache: KVCache) -> np.ndarray:
        logits = self.model.forward(batch, kv_cache)
        after = batch.positions[batch.logit_rows] + 1
        for row in np.flatnonzero(after < len(self.script)):
            if (token_id := self.script[after[row]]) >= 0:
                logits[row, token_id] = 1e4
        return logits


def editing_tasks(tokenizer: object, count: int, vocab_size: int) -> Iterator[Task]:
    """Yield tasks of each kind from every so many problems."""
    problems = read_problems()
    rng = np.random.default_rng(0)
    chosen = problems[:: len(problems) // count][:count]
    for problem, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        function = problem["prompt"] + problem["canonical_solution"]
        name = problem["entry_point"]
        edited = function.replace(name, f"{name}_of_list")
        ask = f"{function}\n\n# The same function, called {name}_of_list:\n\n"
        different = other["prompt"] + other["canonical_solution"]
        prompt, copy, edit, different = (
            [token_id % vocab_size for token_id in tokenizer.encode(text)]
            for text in (ask, function, edited, different)
        )
        size = len(copy)
        yield Task("copy", prompt, copy, size)
        yield Task("edit", prompt, edit, len(edit))
        yield Task("other", prompt, different, len(different))
        noise = rng.permutation(vocab_size - 10)[: len(prompt) + size] + 10
        yield Task("noise", noise[: len(prompt)].tolist(), noise[len(prompt) :].tolist(), size)
        yield Task("free", prompt, None, size)


@dataclass
class Run:
    """One task on one side."""

    seconds: float  # from the first token to the last
    token_ids: list[int]
    drafted: int
    accepted: int
    steps: int


def run(engine: Engine, model: Scripted, task: Task) -> Run:
    model.follow(task)
    ignore_eos = task.answer is not None
    params = SamplingParams(max_tokens=task.max_tokens, ignore_eos=ignore_eos)
    engine.add_request("task", task.prompt, params)
    token_ids: list[int] = []
    started = metrics = None
    while engine.has_unfinished():
        for output in engine.step():
            started = started or perf_counter()
            token_ids += output.token_ids
            metrics = output.metrics
    seconds = perf_counter() - started
    return Run(seconds, token_ids, metrics.draft_tokens, metrics.accepted_tokens, metrics.steps)


def compare(
    model: Decoder, kv_cache: KVCache, tasks: Sequence[Task], rounds: int
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of each kind of task."""
    scripted = Scripted(model)
    engines = {
        side: Engine(
            scripted, kv_cache, max_num_seqs=1, max_model_len=4096, prefix_caching=False,
            speculation=side,
        )
        for side in SIDES
    }  # fmt: skip
    runs: dict[str, list[dict]] = {}
    turns = itertools.cycle((SIDES, SIDES[::-1]))
    longest = max(tasks, key=lambda task: len(task.prompt) + task.max_tokens)
    run(engines[None], scripted, longest)  # memory that is used for the first time costs more
    for task in [task for _ in range(rounds) for task in tasks]:
        pair = {}
        for side in next(turns):
            pair[side] = run(engines[side], scripted, task)
            if side is not None:  # or the next round would find its own output
                engines[side].steps.speculation.corpora.clear()
        assert pair[None].token_ids == pair["suffix"].token_ids, "tokens differ"
        runs.setdefault(task.kind, []).append(pair)
    for kind, pairs in runs.items():
        if kind == "free":
            pairs = [pair for pair in pairs if len(pair[None].token_ids) > 8]
        if pairs:
            yield kind, summary(pairs)


def summary(pairs: list[dict]) -> Row:
    """Return what all tasks of a kind give: ratios of whole times, and those of single tasks."""
    total = {side: sum(pair[side].seconds for pair in pairs) for side in SIDES}
    tokens = sum(len(pair[None].token_ids) for pair in pairs)
    ratios = sorted(pair[None].seconds / pair["suffix"].seconds for pair in pairs)
    drafted = sum(pair["suffix"].drafted for pair in pairs)
    return {
        "tasks": len(pairs),
        "tokens": tokens,
        "tokens_per_s": tokens / total["suffix"],
        "without": tokens / total[None],
        "ratio": total[None] / total["suffix"],
        "median_ratio": median(ratios),
        "least_ratio": ratios[0],
        "tokens_per_step": tokens / sum(pair["suffix"].steps for pair in pairs),
        "accepted": sum(pair["suffix"].accepted for pair in pairs) / max(1, drafted),
    }


@contextlib.contextmanager
def models(args: argparse.Namespace) -> Iterator[Iterator[tuple[str, Decoder, KVCache, object]]]:
    """Provide (name, model, cache, tokenizer) of what is asked for."""
    llm = LLM(args.model, max_model_len=4096, num_threads=args.threads)

    def each() -> Iterator[tuple[str, Decoder, KVCache, object]]:
        if args.shape is None:
            yield args.model, llm.model, llm.kv_cache, llm.tokenizer
            return
        for weights in args.weights:
            with Model(None, args.shape, args.layers, weights).runner(4096) as runner:
                name = f"{args.shape}, {args.layers} layers, {weights}"
                yield name, runner.model, runner.engine.kv_cache, llm.tokenizer

    try:
        yield each()
    finally:
        llm.close()


def rows(args: argparse.Namespace) -> Iterator[tuple[int, int, Row]]:
    """Yield rows as they come."""
    done, total = 0, len(args.kinds) * (1 if args.shape is None else len(args.weights))
    with models(args) as found:
        for name, model, kv_cache, tokenizer in found:
            size = min(model.config.vocab_size, 32000) if args.shape else model.config.vocab_size
            tasks = [
                task
                for task in editing_tasks(tokenizer, args.tasks, size)
                if task.kind in args.kinds and (args.shape is None or task.kind != "free")
            ]
            for kind, row in compare(model, kv_cache, tasks, args.rounds):
                done += 1
                yield done, total, {"what": "speculation", "model": name, "task": kind, **row}


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", default=NAMED, help="a GGUF file or a short name; its tokenizer is always used")
    add("--shape", default=None, help="random weights of this shape, such as 7b")
    add("--layers", type=int, default=4, metavar="N", help="of the shape")
    add("--weights", type=names, default=["bfloat16"], metavar="LIST")
    add("--kinds", type=names, default=["copy", "edit", "other", "noise", "free"], metavar="LIST")
    add("--tasks", type=int, default=8, metavar="N", help="problems of HumanEval")
    add("--rounds", type=int, default=1, metavar="N")
    add("--threads", type=int, default=None, metavar="N")
    args = parsed(parser, sys.argv[1:], QUICK)
    print(measure_limits().describe(), file=sys.stderr, flush=True)
    follow("speculation", rows(args), args.json)


if __name__ == "__main__":
    main()
