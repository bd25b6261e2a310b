"""Decoding over chosen blocks (docs/sparse-decoding.md) against exact decoding: loss and gain.

    python benchmarks/sparse_decoding.py [--fraction 0.25,0.125] [--block-size 64]
    python benchmarks/sparse_decoding.py --keys 32768,100000 --kv-dtype bfloat16,int8,int4

The first measures SmolLM2-135M at its full 8,192 tokens. Perplexity is that of the last --steps
tokens of modules of the standard library. A needle is a number in such a module, asked for at its
end; it counts when each of its tokens is the most likely one. Recall is the share of the exact
attention's mass that lies in the chosen blocks.

The second measures one layer's attention of Code Llama 7B for one sequence over random keys: all
blocks against the chosen ones, the choice included, in turn.
"""

import _pydecimal
import argparse
import inspect
import random
import tarfile
from collections.abc import Iterator
from statistics import median
from types import ModuleType

import numpy as np
from scripts import names, new_parser, numbers, parsed

from codellama_rt import LLM, ops
from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.model import llama
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.model.sparse_attention import DENSE_LAYERS, SparseAttention
from codellama_rt.tools.bench.measure import seconds_of

TEXTS: tuple[ModuleType, ...] = (argparse, _pydecimal, tarfile)
NAMES = ("orchard", "harbor", "violet", "granite", "meadow", "falcon", "copper", "willow")


class Alone:
    """One sequence in a cache of its own, computed token by token after its prompt."""

    def __init__(self, model: Llama, num_tokens: int, prompt_len: int, block_size: int) -> None:
        """Make room."""
        self._model = model
        count = -(-num_tokens // block_size)
        self.kv_cache = KVCache(model.config, num_blocks=count, block_size=block_size)
        self._sequence = Sequence(int32_list(), prompt_len, (0, 0, 0), first_logit=0)
        self._sequence.block_ids = int32_list(range(count))

    def cut(self, num_tokens: int) -> None:
        """Forget what comes after so many tokens."""
        del self._sequence.token_ids[num_tokens:]

    def extend(self, tokens, fraction: float | None = None) -> np.ndarray:
        """Compute tokens; return the logits after the last one, (vocab_size) float32."""
        token_ids = self._sequence.token_ids
        for first in range(0, len(tokens), 512):
            start = len(token_ids)
            token_ids.extend(tokens[first : first + 512])
            chunk = Chunk(self._sequence, start, len(token_ids), 1)
            batch = build_batch([chunk], self.kv_cache.block_size, sparse_decoding=fraction)
            logits = self._model.forward(batch, self.kv_cache)[0]
        return logits


class Mode:
    """A way to decode, and what came of it."""

    def __init__(self, fraction: float | None) -> None:
        """Attend a part of the blocks, or everything."""
        self.fraction = fraction
        self.losses: list[float] = []
        self.found: list[bool] = []
        self.recall: list[float] = []  # per token and layer

    def __str__(self) -> str:
        """Return the row of the table."""
        name = "all blocks" if self.fraction is None else f"{self.fraction:g} of the blocks"
        perplexity, found = np.exp(np.mean(self.losses)), np.mean(self.found)
        recall = f"{np.mean(self.recall):10.4f}" if self.recall else ""
        return f"{name:24}{perplexity:12.4f}{found:10.3f}{recall}"


class Watched(SparseAttention):
    """Attention over chosen blocks; the mass of what they miss is computed as well."""

    recall: list[float]

    def __call__(self, layer, query, key_cache, value_cache, sequences, out):
        """Attend as asked."""
        super().__call__(layer, query, key_cache, value_cache, sequences, out)
        if layer >= DENSE_LAYERS:
            _, lse = ops.paged_attention(query, key_cache, value_cache, *sequences)
            self.recall.append(float(np.exp(out[1] - lse).mean()))


def log_probabilities(
    sequence: Alone, mode: Mode, num_tokens: int, tokens: list[int]
) -> Iterator[np.ndarray]:
    """Yield those of the next token after each of `tokens`, which follow `num_tokens` tokens."""
    sequence.cut(num_tokens)
    Watched.recall = mode.recall
    for token in tokens:
        logits = sequence.extend([token], mode.fraction).astype(np.float64)
        logits -= logits.max()
        yield logits - np.log(np.exp(logits).sum())


def evaluate(
    modes: list[Mode], model: Llama, block_size: int, texts: list[list[int]], steps: int, tasks
) -> None:
    """Decode the last `steps` tokens of texts, and the answers to tasks, in every mode."""
    for text in texts:
        sequence = Alone(model, len(text), len(text) - steps, block_size)
        sequence.extend(text[:-steps])
        for mode in modes:
            rows = log_probabilities(sequence, mode, len(text) - steps, text[-steps:-1])
            mode.losses += [-row[i] for row, i in zip(rows, text[-steps + 1 :], strict=True)]
    for prompt, follow, answer in tasks:
        sequence = Alone(model, len(prompt) + len(follow), len(prompt), block_size)
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


def attention_times(num_keys: int, kv_dtype: str, block_size: int, fraction: float) -> None:
    """Print what a layer of 7B takes for one token."""
    rng = np.random.default_rng(3)
    layers = DENSE_LAYERS + 1
    config = ModelConfig(
        n_layers=layers, n_heads=32, n_kv_heads=32, head_dim=128, dim=4096, hidden_dim=11008,
        vocab_size=32016, max_position_embeddings=num_keys,
    )  # fmt: skip
    count = -(-num_keys // block_size)
    kv_cache = KVCache(config, num_blocks=count, block_size=block_size, dtype=kv_dtype)
    keys, values = kv_cache.layers[DENSE_LAYERS]
    for start in range(0, num_keys, 512):
        rows = rng.standard_normal((2, min(512, num_keys - start), 32, 128), np.float32)
        slots = np.arange(start, start + rows.shape[1], dtype=np.int32)
        ops.reshape_and_cache(*rows, keys, values, slots)
    sequence = Sequence(int32_list([5]) * num_keys, num_keys - 1, (0, 0, 0), first_logit=0)
    sequence.block_ids = int32_list(range(count))
    chunk = Chunk(sequence, num_keys - 1, num_keys, 1)
    batch = build_batch([chunk], block_size, sparse_decoding=fraction)
    query = rng.standard_normal((1, 32, 128), np.float32)
    out = np.empty_like(query), np.empty((1, 32), np.float32)
    sequences = batch.block_tables, batch.seq_lens, batch.cu_seqlens_q

    def dense() -> None:
        ops.paged_attention(query, keys, values, *sequences, out=out)

    attention = SparseAttention.of(batch, kv_cache)  # once per step

    def sparse() -> None:
        attention(DENSE_LAYERS, query, keys, values, sequences, out)

    sparse()  # computes the bounds
    pairs = [(seconds_of(dense), seconds_of(sparse)) for _ in range(9)]
    times = [1e3 * median(one) for one in zip(*pairs, strict=True)]
    ratio = median(a / b for a, b in pairs)
    print(f"{kv_dtype:10}{num_keys:>10}{times[0]:>10.2f}{times[1]:>10.2f}{ratio:>8.2f}", flush=True)


def fractions(text: str) -> list[float]:
    """Return the numbers of a list that is separated by commas."""
    return [float(name) for name in names(text)]


def main(words: list[str] | None = None) -> None:
    """Print a line per mode, or per length."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=384, help="tokens per text that count")
    parser.add_argument("--needles", type=int, default=12)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--fraction", type=fractions, default=[0.25], help="of the blocks")
    parser.add_argument("--keys", type=numbers, help="time attention of 7B over so many")
    parser.add_argument("--kv-dtype", type=names, default=["bfloat16"])
    quick = {"length": 1600, "steps": 8, "needles": 1, "fraction": [0.5]}
    args = parsed(parser, words, quick)
    if args.keys:
        print(f"{'cache':10}{'keys':>10}{'all ms':>10}{'part ms':>10}{'ratio':>8}")
        for kv_dtype in args.kv_dtype:
            for num_keys in args.keys:
                attention_times(num_keys, kv_dtype, args.block_size, args.fraction[0])
        return
    with LLM(args.model, max_model_len=64, prefix_caching=False) as llm:
        encode = llm.tokenizer.encode
        texts = [encode(inspect.getsource(module)) for module in TEXTS]
        whole = [text[: args.length] for text in texts]
        tasks = list(needles(llm.tokenizer, texts[0] + texts[2], args.length, args.needles))
        modes = [Mode(None), *map(Mode, args.fraction)]
        llama.SparseAttention = Watched
        try:
            evaluate(modes, llm.model, args.block_size, whole, args.steps, tasks)
        finally:
            llama.SparseAttention = SparseAttention
        print(f"{'':24}{'perplexity':>12}{'needles':>10}{'recall':>10}")
        print(*modes, sep="\n")


if __name__ == "__main__":
    main()
