"""Requests in, tokens out: one step schedules, computes and samples for all of them.

Synchronous and single-threaded. A request's output is a function of its tokens, its parameters and
its seed; other requests and the order of calls do not change it.
"""

import secrets
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.ends import end_token_ids
from codellama_rt.engine.request import Output, Request, Sample, check_params, checked_prompt
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.scheduler import Schedule, Scheduler
from codellama_rt.engine.sequence import Chunk, Sequence
from codellama_rt.engine.stop_strings import Tokenizer
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.model.lora import LoraAdapter, check_adapter


@dataclass(slots=True)
class _Totals:
    steps: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0
    sample_seconds: float = 0.0


class Engine:
    """Run any number of requests on one model and one KV cache.

    Example:
        >>> engine = Engine(model, kv_cache, tokenizer, max_model_len=4096)  # doctest: +SKIP
        >>> engine.add_request("a", [1, 15043], SamplingParams())  # doctest: +SKIP
        >>> while engine.has_unfinished():  # doctest: +SKIP
        ...     for output in engine.step():
        ...         print(output.text, end="")
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        tokenizer: Tokenizer | None = None,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        max_model_len: int,
        prefix_caching: bool = True,
        generation_config: Mapping | None = None,
    ) -> None:
        """Start with nothing queued and an empty prefix cache.

        Args:
            model: computes the steps, on any device.
            kv_cache: of the model's `kv_cache_type`.
            tokenizer: for the text of outputs; None: outputs carry no text.
            max_num_seqs: sequences per step.
            max_num_batched_tokens: tokens per step; longer prompts are computed in chunks.
            max_model_len: tokens of prompt and output together.
            prefix_caching: whether equal prefixes are computed once.
            generation_config: its "eos_token_id" ends an output, too.
        """
        if max_model_len < 2:
            raise ValueError(f"max_model_len must be >= 2 (one in, one out), got {max_model_len}")
        self.model, self.kv_cache, self.tokenizer = model, kv_cache, tokenizer
        self.max_model_len = max_model_len
        self.eos_token_ids = end_token_ids(model.config, generation_config or {}, tokenizer)
        blocks = BlockManager(kv_cache.num_blocks, kv_cache.block_size, prefix_caching)
        self.scheduler = Scheduler(blocks, max_num_seqs, max_num_batched_tokens)
        scaling = model.config.rope_scaling
        self._has_dynamic_rope = scaling is not None and scaling.kind == "dynamic"
        self._requests: dict[str, Request] = {}  # unfinished
        self._samples: dict[Sequence, Sample] = {}  # unfinished and forked
        self._adapter_numbers: dict[LoraAdapter, int] = {}  # never reused: blocks outlive requests
        self._num_arrived = 0
        self._totals = _Totals()
        self._closed = False

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: LoraAdapter | None = None,
    ) -> None:
        """Queue a request; `step` returns its outputs.

        Args:
            request_id: unique among the unfinished requests.
            prompt_token_ids: at least one token id.
            params: how to sample; None: greedy.
            priority: smaller goes first; equal priorities are served in order of arrival.
            adapter: applied to the tokens of this request only.

        Raises:
            ValueError: an id in use, a token outside the vocabulary, a prompt that can never fit.
            TypeError: a wrong type. In both cases nothing has changed.
            RuntimeError: the engine is closed.
        """
        self._check_request(request_id, priority)
        params = SamplingParams() if params is None else params
        vocab_size = self.model.config.vocab_size
        check_params(params, vocab_size, self.tokenizer is not None)
        token_ids = checked_prompt(prompt_token_ids, vocab_size)
        self.check_length(len(token_ids))
        sequence = self.make_sequence(token_ids, (priority, self._num_arrived, 0), adapter)
        request = self._make_request(request_id, sequence, params)
        sample = request.samples[0]
        self.scheduler.add(sample.sequence)
        self._num_arrived += 1
        self._requests[request_id] = request
        self._samples[sample.sequence] = sample
        self._totals.prompt_tokens += len(token_ids)

    def step(self) -> list[Output]:
        """Compute one batch and return what each sample gained, possibly nothing.

        Raises:
            Exception: the model's own error; no request has changed, so the step can be repeated.
        """
        if not self._requests:
            return []
        started = perf_counter()
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            raise RuntimeError("the scheduler found nothing to do for unfinished requests")
        self._totals.schedule_seconds += perf_counter() - started
        logits = self.compute(schedule)
        computed = perf_counter()
        outputs = self._take_logits(schedule, logits)
        self._totals.sample_seconds += perf_counter() - computed
        return outputs

    def compute(self, schedule: Schedule) -> np.ndarray:
        """Run the model on a schedule of `scheduler`, or of another one over the same blocks.

        Returns:
            (num_logits, vocab_size) float32, the rows of the chunks in order.
        """
        started = perf_counter()
        if schedule.block_copies:
            self.kv_cache.copy_blocks(np.array(schedule.block_copies, np.int32))
        batch = build_batch(
            schedule.chunks, self.kv_cache.block_size, rope_lengths=self._has_dynamic_rope
        )
        scheduled = perf_counter()
        logits = self.model.forward(batch, self.kv_cache)
        totals = self._totals
        totals.steps += 1
        totals.computed_tokens += len(batch.token_ids)
        totals.schedule_seconds += scheduled - started
        totals.model_seconds += perf_counter() - scheduled
        return logits

    def abort(self, request_id: str) -> list[Output]:
        """End a request now and free its blocks; an unknown or finished one is ignored.

        Returns:
            The last output of each of its unfinished samples, with any text held back so far.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        unfinished = [s for s in request.samples if s.sequence in self._samples]
        for sample in unfinished:
            self._free(sample)
        del self._requests[request_id]
        # Samples that still wait for the prompt get their last output, too.
        return [sample.end("abort") for sample in (*unfinished, *request.fork())]

    def has_unfinished(self) -> bool:
        """Return whether another step is needed."""
        return bool(self._requests)

    def progress(self, request_id: str) -> tuple[int, int]:
        """Return how far an unfinished prompt is: (tokens computed, tokens of the prompt)."""
        sequence = self._requests[request_id].samples[0].sequence
        return min(sequence.num_computed, sequence.prompt_len), sequence.prompt_len

    def stats(self) -> dict[str, int | float]:
        """Return current gauges (running, waiting, KV use) and totals since the start."""
        blocks, totals = self.scheduler.blocks, self._totals
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "kv_blocks": blocks.num_blocks,
            "kv_blocks_free": blocks.num_free,
            "kv_usage": 1.0 - blocks.num_free / blocks.num_blocks,
            "preemptions": self.scheduler.num_preemptions,
            "prefix_queried_tokens": blocks.num_queried_tokens,
            "prefix_hit_tokens": blocks.num_hit_tokens,
            **{name: getattr(totals, name) for name in _Totals.__slots__},
        }

    def make_sequence(
        self, token_ids: array, order: tuple[int, int, int], adapter: LoraAdapter | None = None
    ) -> Sequence:
        """Return a prompt as a sequence whose last token's logits are needed."""
        salt = self._cache_salt(prompt_len := len(token_ids))
        if adapter is not None:  # its keys and values differ from those of the plain model
            check_adapter(adapter, self.model)
            number = self._adapter_numbers.setdefault(adapter, len(self._adapter_numbers) + 1)
            salt += number << 32
        return Sequence(token_ids, prompt_len, order, prompt_len - 1, salt, adapter)

    def check_length(self, prompt_len: int) -> None:
        """Raise ValueError if a prompt leaves no room for a token."""
        if prompt_len > self.max_model_len - 1:
            raise ValueError(
                f"prompt of {prompt_len} tokens does not fit max_model_len={self.max_model_len} "
                f"with a token to generate: at most {self.max_model_len - 1}; "
                "shorten the prompt or raise max_model_len"
            )

    def close(self) -> None:
        """Abort unfinished requests and accept no further ones."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._closed = True

    def _check_request(self, request_id: str, priority: int) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")
        if not isinstance(request_id, str) or not request_id:
            raise TypeError(f"request_id must be a non-empty str, got {request_id!r}")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise TypeError(f"priority must be an int, got {type(priority).__name__}")

    def _make_request(self, request_id: str, sequence: Sequence, params: SamplingParams) -> Request:
        if params.prompt_logprobs is not None:
            sequence.first_logit = 0
        return Request(
            request_id,
            params,
            sequence,
            max_len=self._max_len(sequence.prompt_len, params),
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.model.config.vocab_size,
            tokenizer=self.tokenizer,
        )

    def _max_len(self, prompt_len: int, params: SamplingParams) -> int:
        # The last token is never computed, so it needs no room in the cache.
        limit = min(self.max_model_len, self.scheduler.max_computed_tokens + 1)
        return limit if params.max_tokens is None else min(limit, prompt_len + params.max_tokens)

    def _cache_salt(self, prompt_len: int) -> int:
        # Under dynamic RoPE scaling the keys of a prompt longer than the trained length depend on
        # its length; such prompts share cached prefixes only with those of the same length.
        if not self._has_dynamic_rope:
            return 0
        return max(0, prompt_len - self.model.config.max_position_embeddings)

    def _take_logits(self, schedule: Schedule, logits: np.ndarray) -> list[Output]:
        outputs: list[Output] = []
        end = 0
        for chunk in schedule.chunks:
            begin, end = end, end + chunk.num_logits
            self.scheduler.commit(chunk)
            if chunk.num_logits:
                self._take_chunk(chunk, logits[begin:end], outputs)
        return outputs

    def _take_chunk(self, chunk: Chunk, logits: np.ndarray, outputs: list[Output]) -> None:
        """Use the logits of a chunk's last tokens, (num_logits, vocab_size)."""
        sample = self._samples[chunk.sequence]
        request = sample.request
        num_prompt_logits = len(logits) - chunk.samples
        if num_prompt_logits:
            first = chunk.stop - len(logits)
            request.take_prompt_logits(logits[:num_prompt_logits], first)
        if not chunk.samples:
            return
        forks = request.fork() if len(request.samples) < request.params.n else ()
        for fork in forks:
            self._samples[fork.sequence] = fork
            self.scheduler.add_fork(chunk.sequence, fork.sequence)
        for sampled in (sample, *forks):
            outputs.append(self._sample(sampled, logits[-1]))

    def _sample(self, sample: Sample, logits: np.ndarray) -> Output:
        try:
            output = sample.accept(logits)
            self._totals.generated_tokens += 1
        except Exception as error:  # ends one request; the others must not lose their tokens
            output = sample.end("error", error)
        if output.finished:
            self._free(sample)
            sample.request.num_unfinished -= 1
            if sample.request.num_unfinished == 0:
                del self._requests[sample.request.request_id]
        return output

    def _free(self, sample: Sample) -> None:
        self.scheduler.remove(sample.sequence)
        del self._samples[sample.sequence]
