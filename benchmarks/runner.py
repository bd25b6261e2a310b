"""A model behind an engine, at any depth of context without paying for the prompt."""

from __future__ import annotations

from os import PathLike
from time import perf_counter
from unittest.mock import patch

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine import Engine
from codellama_rt.kv_cache import KVCache, bytes_per_token
from codellama_rt.model import Llama
from codellama_rt.sampling_params import SamplingParams
from codellama_rt.traffic import weight_bytes

BLOCK_SIZE = 64
MAX_STEPS = 256  # decode steps of one request, at most


class Runner:
    """Times steps of the engine: scheduling, the model and greedy sampling together."""

    def __init__(self, path: str | PathLike[str], max_depth: int, kv_dtype: str = "auto") -> None:
        """Open a checkpoint and a cache of max_depth + MAX_STEPS tokens, full of noise."""
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        self.kv_dtype = self.config.dtype if kv_dtype == "auto" else kv_dtype
        self.weight_bytes = weight_bytes(checkpoint.weights)
        max_len = max_depth + MAX_STEPS
        cache = KVCache(
            self.config, num_blocks=-(-max_len // BLOCK_SIZE), block_size=BLOCK_SIZE,
            dtype=self.kv_dtype,
        )  # fmt: skip
        _fill_with_noise(cache)
        self.model = _SkippableModel(Llama(self.config, checkpoint.weights))
        self.engine = Engine(
            self.model, cache, max_num_seqs=1, max_model_len=max_len, prefix_caching=False
        )
        self._rng = np.random.default_rng(0)

    def decode(self, depth: int, steps: int) -> list[float]:
        """Seconds of each of `steps` decode steps after a context of `depth` tokens."""
        self._start(depth, steps)
        try:
            return [self._timed_step() for _ in range(steps)]
        finally:
            self.engine.abort("bench")

    def decode_and_replay(self, depth: int, steps: int) -> tuple[list[float], list[float]]:
        """Seconds of decode steps, and of the same kernel calls with nothing of Python between.

        The calls of one step are recorded once. Their replay writes what the step wrote.
        """
        self._start(depth, steps + 1)
        recorder = _Recorder(ops._core)
        try:
            with patch.object(ops, "_core", recorder):
                self.engine.step()
            whole, kernels = [], []
            for _ in range(steps):
                whole.append(self._timed_step())
                started = perf_counter()
                for call, args in recorder.calls:
                    call(*args)
                kernels.append(perf_counter() - started)
            return whole, kernels
        finally:
            self.engine.abort("bench")

    def prefill(self, num_tokens: int) -> float:
        """Seconds from a prompt of `num_tokens` tokens to its first new token."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        self.engine.add_request("bench", self._prompt(num_tokens), params)
        started = perf_counter()
        while self.engine.has_unfinished():
            self.engine.step()
        return perf_counter() - started

    def decode_bytes(self, depth: int) -> int:
        """Bytes that a decode step at `depth` has to read."""
        return self.weight_bytes + depth * bytes_per_token(self.config, self.kv_dtype)

    def prefill_flops(self, num_tokens: int) -> int:
        """Multiplications and additions of a prompt; the head sees its last token alone."""
        c = self.config
        per_layer = c.dim * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.hidden_dim)
        attention = 2 * num_tokens * c.n_heads * c.head_dim  # causal: half of 4
        head = 2 * c.dim * c.vocab_size
        return num_tokens * c.n_layers * (2 * per_layer + attention) + head

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits after the last of the tokens, (vocab_size) float32."""
        from codellama_rt.scoring import sequence_logits

        return sequence_logits(self.model.model, token_ids, kv_dtype=self.kv_dtype)[-1]

    def _prompt(self, num_tokens: int) -> np.ndarray:
        return self._rng.integers(3, self.config.vocab_size, num_tokens)

    def _start(self, depth: int, steps: int) -> None:
        """Bring a request to its first decode step; its prompt is what the pages held before."""
        if steps + 1 > MAX_STEPS:
            raise ValueError(f"steps must be under {MAX_STEPS}, got {steps}")
        params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
        self.engine.add_request("bench", self._prompt(depth), params)
        self.model.is_skipping = True
        while not self.engine.step():
            pass
        self.model.is_skipping = False

    def _timed_step(self) -> float:
        started = perf_counter()
        self.engine.step()
        return perf_counter() - started


class _SkippableModel:
    """A model whose steps can be left out; the cache then keeps what it held."""

    def __init__(self, model: Llama) -> None:
        self.model, self.config, self.is_skipping = model, model.config, False

    def forward(self, batch: object, kv_cache: KVCache) -> np.ndarray:
        if self.is_skipping:
            return np.zeros((len(batch.logit_rows), self.config.vocab_size), np.float32)
        return self.model.forward(batch, kv_cache)


class _Recorder:
    """Passes calls on to a module and keeps them."""

    def __init__(self, module: object) -> None:
        self._module, self.calls = module, []

    def __getattr__(self, name: str) -> object:
        call = getattr(self._module, name)

        def record(*args: object) -> object:
            self.calls.append((call, args))
            return call(*args)

        return record


def _fill_with_noise(cache: KVCache) -> None:
    """A few pages of noise over and over; kernels take as long for them as for real ones."""
    rng = np.random.default_rng(1)
    for keys, values in cache.layers:
        for pages in (keys, values):
            noise = rng.standard_normal((min(7, len(pages)), *pages.shape[1:]), np.float32)
            noise = noise.astype(pages.dtype)
            for begin in range(0, len(pages), len(noise)):
                pages[begin : begin + len(noise)] = noise[: len(pages) - begin]
