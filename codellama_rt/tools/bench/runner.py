"""A model behind an engine, at any depth of context without computing the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from statistics import median

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint import Checkpoint
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.memory_plan import weight_bytes
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.kv_cache import KVCache, bytes_per_token
from codellama_rt.model.llama import Llama
from codellama_rt.ops.native import _core
from codellama_rt.tools.bench.measure import seconds_of
from codellama_rt.tools.bench.noise import fill_caches

BLOCK_SIZE = 64
MAX_STEPS = 256  # maximum decode steps per request


class Runner:
    """Run steps of the engine: scheduling, the model and greedy sampling together."""

    def __init__(
        self, checkpoint: Checkpoint, max_depth: int, kv_dtype: str = "auto", samples: int = 1
    ) -> None:
        """Create an engine for `samples` of one prompt, its cache full of noise.

        The cache has room for max_depth tokens, which the samples share, and MAX_STEPS of each.
        """
        self.config = checkpoint.config
        self.kv_dtype = self.config.dtype if kv_dtype == "auto" else kv_dtype
        projection = checkpoint.weights.layers[0].q_proj.dtype
        self.weights_dtype = projection if isinstance(projection, str) else projection.name
        self.weight_bytes = weight_bytes(checkpoint.weights)
        max_len = max_depth + MAX_STEPS
        cache = KVCache(
            self.config,
            num_blocks=-(-max_depth // BLOCK_SIZE) + samples * (1 + MAX_STEPS // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            dtype=self.kv_dtype,
        )
        rng = np.random.default_rng(1)
        for caches in cache.layers:
            fill_caches(*caches, rng)
        self.model = _SkippableModel(Llama(self.config, checkpoint.weights))
        self.engine = Engine(
            self.model,
            cache,
            max_num_seqs=samples,
            max_model_len=max_len,
            prefix_caching=False,
            max_step_seconds=None,  # which would cut prompts by what earlier steps took
        )
        self._samples = samples
        self._rng = np.random.default_rng(0)

    @contextlib.contextmanager
    def at_depth(self, depth: int, steps: int) -> Iterator[None]:
        """Provide a request at `depth` tokens for up to `steps` decode steps.

        Its prompt is not computed: the noise in the cache takes its place.
        """
        if steps + 1 > MAX_STEPS:
            raise ValueError(f"steps must be under {MAX_STEPS}, got {steps}")
        params = SamplingParams(n=self._samples, max_tokens=steps + 2, ignore_eos=True)
        self.engine.add_request("bench", self._prompt(depth), params)
        self.model.is_skipping = True
        while not self.engine.step():
            pass
        self.model.is_skipping = False
        try:
            yield
        finally:
            self.engine.abort("bench")

    def step(self) -> None:
        """Run one decode step."""
        self.engine.step()

    def decode(self, depth: int, steps: int) -> list[float]:
        """Return the seconds of each of `steps` decode steps after `depth` tokens of context."""
        with self.at_depth(depth, steps):
            return [seconds_of(self.step) for _ in range(steps)]

    def python_share(self, depth: int, steps: int) -> float:
        """Return the share of a decode step that is neither kernels nor their calls from Python.

        The calls of each step are recorded and replayed between steps: paired, so without drift.
        """
        recorder = _Recorder(_core)
        with self.at_depth(depth, steps + 1):
            with recorder.in_place_of_kernels():
                self.step()
            pairs = [(seconds_of(self.step), seconds_of(recorder.replay)) for _ in range(steps)]
        return median(1 - kernels / whole for whole, kernels in pairs)

    def add_prompt(self, num_tokens: int) -> None:
        """Submit a prompt for `run_prompt`."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        self.engine.add_request("bench", self._prompt(num_tokens), params)

    def run_prompt(self) -> None:
        """Run the submitted prompt up to its first new token."""
        while self.engine.has_unfinished():
            self.engine.step()

    def prefill(self, num_tokens: int) -> float:
        """Return the seconds from a prompt of `num_tokens` tokens to its first new token."""
        self.add_prompt(num_tokens)
        return seconds_of(self.run_prompt)

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that a decode step at `depth` has to read."""
        return self.weight_bytes + depth * bytes_per_token(self.config, self.kv_dtype)

    def prefill_flops(self, num_tokens: int) -> int:
        """Return the multiplications and additions of a prompt.

        Only its last token has logits: of the others the last layer computes keys and values alone.
        """
        c = self.config
        attending, caching = (c.dim * n * c.head_dim for n in (c.n_heads, 2 * c.n_kv_heads))
        per_token = 2 * (2 * attending + 3 * c.dim * c.hidden_dim)  # but for keys and values
        scores = 2 * num_tokens * c.n_heads * c.head_dim  # causal: half of 4
        layers = num_tokens * (c.n_layers - 1) * (per_token + scores) + per_token + 2 * scores
        head = 2 * c.dim * c.vocab_size
        return layers + num_tokens * c.n_layers * 2 * caching + head

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Return the logits after the last of the tokens, (vocab_size) float32."""
        return sequence_logits(self.model.model, token_ids, kv_dtype=self.kv_dtype)[-1]

    def _prompt(self, num_tokens: int) -> np.ndarray:
        return self._rng.integers(3, self.config.vocab_size, num_tokens)


class _SkippableModel:
    """A model whose steps can be skipped; the cache then keeps its contents."""

    def __init__(self, model: Llama) -> None:
        self.model, self.config, self.is_skipping = model, model.config, False

    def forward(self, batch: object, kv_cache: KVCache) -> np.ndarray:
        if self.is_skipping:
            return np.zeros((len(batch.logit_rows), self.config.vocab_size), np.float32)
        return self.model.forward(batch, kv_cache)


class _Recorder:
    """Pass calls on to a module and record them."""

    def __init__(self, module: object) -> None:
        self._module, self.calls = module, []

    def __getattr__(self, name: str) -> object:
        call = getattr(self._module, name)

        def record(*args: object) -> object:
            self.calls.append((call, args))
            return call(*args)

        return record

    @contextlib.contextmanager
    def in_place_of_kernels(self) -> Iterator[None]:
        """Stand where the operators look for their kernels."""
        callers = (ops.attention, ops.dense)
        for module in callers:
            module._core = self
        try:
            yield
        finally:
            for module in callers:
                module._core = self._module

    def replay(self) -> None:
        """Repeat the recorded calls without any other Python in between."""
        for call, args in self.calls:
            call(*args)
