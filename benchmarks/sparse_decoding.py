"""Decoding over chosen blocks (Quest, arXiv:2406.10774) against exact decoding: loss and gain.

    python benchmarks/sparse_decoding.py [--block-size 16,64] [--fraction 0.25] [--oracle]

Each KV head attends the first block, the last two, and those of the others whose keys may give the
largest score: per block it has the least and the greatest key of each dimension, which bound q k.
Prompts are computed exactly, and so are the first two layers. --oracle chooses by the true mass of
attention instead, which no method can know beforehand: the best that whole blocks allow.

The model is SmolLM2-135M at its full 8,192 tokens. Perplexity is that of the last --steps tokens of
modules of the standard library. A needle is a number in such a module, asked for at its end; it
counts when each of its tokens is the most likely one. Recall is the share of the exact attention's
mass that lies in the chosen blocks. `x attention` is the time of the operator over all blocks by
its time over the chosen ones: choosing them, here in NumPy, is not in it.
"""

import _pydecimal
import argparse
import inspect
import random
import tarfile
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from types import ModuleType

import numpy as np
from scripts import new_parser, numbers, parsed

from codellama_rt import LLM, ops
from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.model import llama
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama

TEXTS: tuple[ModuleType, ...] = (argparse, _pydecimal, tarfile)
DENSE_LAYERS, RECENT = 2, 2
NAMES = ("orchard", "harbor", "violet", "granite", "meadow", "falcon", "copper", "willow")


class ChosenBlocks:
    """The operators, with attention over chosen blocks where there is one query."""

    def __init__(self, block_size: int, fraction: float, oracle: bool) -> None:
        """Choose `fraction` of the blocks of `block_size` tokens."""
        self._block_size, self._fraction, self._oracle = block_size, fraction, oracle
        self._bounds: list[tuple[np.ndarray, np.ndarray]] = []  # per layer, of full blocks
        self._layer = 0
        self.recall: list[float] = []  # per token and sparse layer
        self.seconds: list[tuple[float, float]] = []  # of the operator: all blocks, chosen ones

    def check_layers(self) -> None:
        """Raise RuntimeError if a token was not attended in every layer."""
        if self._layer:
            raise RuntimeError(f"only {self._layer} of {len(self._bounds)} layers attended")

    def __getattr__(self, name: str) -> object:
        """Pass on what is not attention."""
        return getattr(ops, name)

    def start(self, kv_cache: KVCache, num_tokens: int) -> None:
        """Take the keys of a prompt."""
        full = num_tokens // self._block_size
        self._bounds = [(keys[:full].min(2), keys[:full].max(2)) for keys, _ in kv_cache.layers]
        self._layer = 0

    def paged_attention(self, query, keys, values, tables, seq_lens, ends, *, out):
        """Attend as `ops.paged_attention` does; more than one query attends everything."""
        started = perf_counter()
        ops.paged_attention(query, keys, values, tables, seq_lens, ends, out=out)
        dense_seconds = perf_counter() - started
        layer, self._layer = self._layer, (self._layer + 1) % len(self._bounds or [0])
        if len(query) != 1 or layer < DENSE_LAYERS:
            return
        length, heads = int(seq_lens[0]), keys.shape[1]
        per_head = query.reshape(heads, -1, query.shape[2])  # (n_kv_heads, group, head_dim)
        chosen = self._choose(per_head, keys, self._bounds[layer], length)
        # Each KV head is a sequence of its own over the blocks of one head.
        table = (chosen * heads + np.arange(heads)[:, None]).astype(np.int32)
        last = (length - 1) // self._block_size
        lens = np.full(heads, (table.shape[1] - 1) * self._block_size + length, np.int32)
        lens -= last * self._block_size
        apart = [cache.reshape(-1, 1, *cache.shape[2:]) for cache in (keys, values)]
        attended, lse = np.empty_like(per_head), np.empty(per_head.shape[:2], np.float32)
        every = np.arange(heads + 1, dtype=np.int32)
        started = perf_counter()
        ops.paged_attention(per_head, *apart, table, lens, every, out=(attended, lse))
        self.seconds.append((dense_seconds, perf_counter() - started))
        self.recall.append(float(np.exp(lse.ravel() - out[1].ravel()).mean()))
        out[0][:] = attended.reshape(query.shape)

    def _choose(self, query, keys, bounds, length: int) -> np.ndarray:
        """Return the blocks of each head, (n_kv_heads, count), rising; the last one is the last."""
        size = self._block_size
        total, full = -(-length // size), length // size
        count = max(int(total * self._fraction), RECENT + 1)
        if self._oracle:
            scores = np.einsum("hgd,nhsd->hgns", query, keys[:full]) * query.shape[2] ** -0.5
            weights = np.exp(scores - scores.max((2, 3), keepdims=True))
            best = (weights / weights.sum((2, 3), keepdims=True)).sum((1, 3))
        else:
            least, greatest = self._of_all(keys, bounds, full)
            best = np.einsum("hgd,nhd->hgn", np.maximum(query, 0), greatest)
            best += np.einsum("hgd,nhd->hgn", np.minimum(query, 0), least)
            best = best.max(1)  # (n_kv_heads, full)
        best = np.pad(best, ((0, 0), (0, total - full)))
        best[:, 0] = best[:, total - RECENT :] = np.inf
        return np.sort(np.argpartition(-best, count - 1)[:, :count])

    @staticmethod
    def _of_all(keys, bounds, full: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of a prompt's blocks and of those that were filled since."""
        new = keys[len(bounds[0]) : full]
        return np.concatenate([bounds[0], new.min(2)]), np.concatenate([bounds[1], new.max(2)])


class Alone:
    """One sequence in a cache of its own, computed token by token after its prompt."""

    def __init__(self, model: Llama, num_tokens: int, block_size: int) -> None:
        """Make room."""
        self.model = model
        count = -(-num_tokens // block_size)
        self.kv_cache = KVCache(model.config, num_blocks=count, block_size=block_size)
        self._sequence = Sequence(int32_list(), 0, (0, 0, 0), first_logit=0)
        self._sequence.block_ids = int32_list(range(count))

    def cut(self, num_tokens: int) -> None:
        """Forget what comes after so many tokens."""
        del self._sequence.token_ids[num_tokens:]

    def extend(self, tokens) -> np.ndarray:
        """Compute tokens; return the logits after the last one, (vocab_size) float32."""
        token_ids = self._sequence.token_ids
        for first in range(0, len(tokens), 512):
            start = len(token_ids)
            token_ids.extend(tokens[first : first + 512])
            chunk = Chunk(self._sequence, start, len(token_ids), 1)
            batch = build_batch([chunk], self.kv_cache.block_size)
            logits = self.model.forward(batch, self.kv_cache)[0]
        return logits


class Mode:
    """A way to decode, and what came of it."""

    def __init__(self, name: str, chosen: ChosenBlocks | None = None) -> None:
        """Decode over chosen blocks, or exactly."""
        self.name, self.chosen = name, chosen
        self.losses: list[float] = []
        self.found: list[bool] = []

    def line(self) -> str:
        """Return the row of the table."""
        perplexity, found = np.exp(np.mean(self.losses)), np.mean(self.found)
        line = f"{self.name:24}{perplexity:12.4f}{found:10.3f}"
        if self.chosen is None:
            return line
        dense, sparse = (median(times) for times in zip(*self.chosen.seconds, strict=True))
        return f"{line}{np.mean(self.chosen.recall):10.4f}{dense / sparse:13.2f}"


def log_probabilities(
    sequence: Alone, mode: Mode, num_tokens: int, tokens: list[int]
) -> Iterator[np.ndarray]:
    """Yield those of the next token after each of `tokens`, which follow `num_tokens` tokens."""
    sequence.cut(num_tokens)
    whole = sequence.model._whole
    if mode.chosen is not None:
        mode.chosen.start(sequence.kv_cache, num_tokens)
        llama.ops, sequence.model._whole = mode.chosen, [None] * len(whole)  # no layer is one call
    try:
        for token in tokens:
            logits = sequence.extend([token]).astype(np.float64)
            if mode.chosen is not None:
                mode.chosen.check_layers()
            logits -= logits.max()
            yield logits - np.log(np.exp(logits).sum())
    finally:
        llama.ops, sequence.model._whole = ops, whole


def evaluate(
    modes: list[Mode], model: Llama, block_size: int, texts: list[list[int]], steps: int, tasks
) -> None:
    """Decode the last `steps` tokens of texts, and the answers to tasks, in every mode."""
    for text in texts:
        sequence = Alone(model, len(text), block_size)
        sequence.extend(text[:-steps])
        for mode in modes:
            rows = log_probabilities(sequence, mode, len(text) - steps, text[-steps:-1])
            mode.losses += [-row[i] for row, i in zip(rows, text[-steps + 1 :], strict=True)]
    for prompt, follow, answer in tasks:
        sequence = Alone(model, len(prompt) + len(follow), block_size)
        sequence.extend(prompt)
        for mode in modes:
            rows = list(log_probabilities(sequence, mode, len(prompt), follow))[-len(answer) :]
            mode.found.append([int(row.argmax()) for row in rows] == answer)


def needles(tokenizer, text: list[int], length: int, count: int) -> Iterator[tuple]:
    """Yield (prompt, question with its answer, tokens of the answer)."""
    rng = random.Random(7)
    for _ in range(count):
        name, number = rng.choice(NAMES), rng.randrange(10**6, 10**7)
        fact = f"\n# Remember: the secret number of {name} is {number}.\n"
        asked = (
            f"\n# Question: what is the secret number of {name}?\n# The secret number of {name} is"
        )
        fact, asked, answer = map(tokenizer.encode, (fact, asked, f" {number}"))
        start = rng.randrange(2000)
        around = text[start : start + length - len(fact) - len(asked) - len(answer)]
        cut = rng.randrange(len(around))
        yield around[:cut] + fact + around[cut:], asked + answer[:-1], answer


def main(words: list[str] | None = None) -> None:
    """Print a line per mode."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=512, help="tokens per text that count")
    parser.add_argument("--needles", type=int, default=24)
    parser.add_argument("--block-size", type=numbers, default=[16, 64])
    parser.add_argument("--fraction", type=float, default=0.25, help="of the blocks")
    parser.add_argument("--oracle", action="store_true", help="choose by the true mass as well")
    quick = {"length": 512, "steps": 8, "needles": 1, "block_size": [16]}
    args = parsed(parser, words, quick)

    with LLM(args.model, max_model_len=64, prefix_caching=False) as llm:
        encode = llm.tokenizer.encode
        texts = [encode(inspect.getsource(module)) for module in TEXTS]
        whole = [text[: args.length] for text in texts]
        tasks = list(needles(llm.tokenizer, texts[0] + texts[2], args.length, args.needles))
        print(f"{'':24}{'perplexity':>12}{'needles':>10}{'recall':>10}{'x attention':>13}")
        for size in args.block_size:
            modes = [Mode(f"exact, blocks of {size}")]
            for name, oracle in (("bounds", False), ("oracle", True))[: 1 + args.oracle]:
                modes.append(
                    Mode(f"{name}, blocks of {size}", ChosenBlocks(size, args.fraction, oracle))
                )
            evaluate(modes, llm.model, size, whole, args.steps, tasks)
            print(*(mode.line() for mode in modes), sep="\n", flush=True)


if __name__ == "__main__":
    main()
