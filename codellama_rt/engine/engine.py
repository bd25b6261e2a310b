"""Requests in, tokens out: one step schedules, computes and samples for all of them.

A request's output is a function of its tokens, its parameters and its seed; other requests, the
order of calls and the threads they come from do not change it.

Each method has the engine to itself (`Owner`), and whatever is raised in it, nothing is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from codellama_rt.engine.admission import Admission, checked_seconds, checked_tokens
from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.metrics import StepRecord
from codellama_rt.engine.output import Output
from codellama_rt.engine.owner import Owner
from codellama_rt.engine.request import Request
from codellama_rt.engine.request_table import RequestTable
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.speculation import Speculation, check_speculation
from codellama_rt.engine.step_cost import StepCost
from codellama_rt.engine.steps import Steps
from codellama_rt.engine.stop_strings import Tokenizer
from codellama_rt.errors import QueueFullError
from codellama_rt.model.batch import Batch
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.model.lora import LoraAdapter

if TYPE_CHECKING:
    from codellama_rt.engine.disk_cache.store import PrefixStore


class Engine:
    """Run any number of requests on one model and one KV cache.

    Attributes:
        on_step: called after each step, by the thread that made it; it must not use the engine.
            What it raises is logged.

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
        max_step_seconds: float | None = 1.0,
        max_queued_tokens: int | None = None,
        check_files: Callable[[], None] | None = None,
        logits_processors: Collection[LogitsProcessor] = (),
        speculation: str | None = None,
        prefix_store: PrefixStore | None = None,
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
            max_step_seconds: how long a step with prompts may take while others wait for it, by a
                model of cost that learns from the steps; beside running outputs at most three times
                what they take alone. It changes when tokens are computed and no bit of them. None:
                steps are bounded by `max_num_batched_tokens` alone.
            max_queued_tokens: prompt tokens that may wait to be computed; None: any number.
            check_files: called before each request; raises if a file with weights has changed.
            logits_processors: as those of `SamplingParams`, for every request, before its own.
            speculation: "suffix" computes tokens that followed the same text before together with
                the next one, and takes those that would have come; None: one token at a time. It
                changes how fast tokens come and no bit of them.
            prefix_store: where prefixes are kept beyond this engine's life; needs prefix_caching,
                and a KV cache in host memory.
        """
        check_speculation(speculation)
        self.model, self.kv_cache, self.tokenizer = model, kv_cache, tokenizer
        blocks = BlockManager(kv_cache.num_blocks, kv_cache.block_size, prefix_caching)
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs,
            max_num_batched_tokens,
            max_step_seconds=checked_seconds("max_step_seconds", max_step_seconds),
            cost=None if max_step_seconds is None else StepCost(model.config),
        )
        self.admission = Admission(
            model,
            tokenizer,
            self.scheduler,
            max_model_len,
            generation_config=generation_config,
            check_files=check_files,
            logits_processors=logits_processors,
        )
        self.max_queued_tokens = checked_tokens("max_queued_tokens", max_queued_tokens)
        self.on_step: Callable[[StepRecord], None] | None = None
        self.table = RequestTable(self.scheduler)
        self.steps = Steps(
            model,
            kv_cache,
            self.scheduler,
            self.table,
            has_dynamic_rope=self.admission.has_dynamic_rope,
            speculation=Speculation(model.config, self.scheduler.cost) if speculation else None,
        )
        self.owner = Owner(self.steps.recover)
        self._discarded: deque[str] = deque()  # requests to end before anything else
        self._closed = False
        self._persistence = None
        if prefix_store is not None:
            # Imported here: most engines have none.
            from codellama_rt.engine.disk_cache.persistence import Persistence

            self._persistence = Persistence(prefix_store, kv_cache, self.scheduler, self.admission)
            self.steps.searches.add(self._persistence.restorer)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: LoraAdapter | None = None,
        cache_salt: str | None = None,
        inbox: deque[Output] | None = None,
    ) -> None:
        """Queue a request; `step` returns its outputs.

        Args:
            request_id: unique among the unfinished requests.
            prompt_token_ids: at least one token id.
            params: how to sample; None: greedy.
            priority: smaller goes first; equal priorities are served in order of arrival.
            adapter: applied to the tokens of this request only.
            cache_salt: requests share cached prefixes only if their salts are equal, so that nobody
                learns from an answer's time what others have asked; None: with all that have none.
            inbox: receives the outputs in place of `step`'s result.

        Raises:
            ValueError: an id in use, a token outside the vocabulary, a prompt that can never fit,
                or a grammar that cannot be compiled.
            TypeError: a wrong type.
            QueueFullError: more than `max_queued_tokens` would wait. In all cases nothing has
                changed.
            RuntimeError: the engine is closed, or a file with weights has changed.
            ImportError: `structured_outputs` without llguidance.
        """
        request = self.admission.make_request(
            request_id,
            prompt_token_ids,
            params,
            priority=priority,
            adapter=adapter,
            cache_salt=cache_salt,
            inbox=inbox,
        )
        self.submit(request)

    def submit(self, request: Request) -> None:
        """Queue a request of `admission.make_request`; raises as `add_request` does."""
        with self.owner:
            self._drop_discarded()
            error = self._reason_to_refuse(request)
            if error is None:
                self.steps.totals.prompt_tokens += request.samples[0].sequence.prompt_len
                self.table.add(request)
        if error is not None:
            raise error

    def check_queue(self, num_tokens: int) -> None:
        """Raise QueueFullError if so many more prompt tokens are more than may wait.

        It may be called in any thread, also while a step is under way.
        """
        pending = self.scheduler.num_pending_tokens
        if self.max_queued_tokens is not None and pending + num_tokens > self.max_queued_tokens:
            seconds = self.scheduler.backlog_seconds()
            raise QueueFullError(pending, self.max_queued_tokens, seconds)

    def step(self) -> list[Output]:
        """Compute one batch and return what each sample gained, possibly nothing.

        Outputs that no call has returned yet come first: of a step that raised, or that was made
        by another thread for requests of its own.

        If the model fails, each sequence is tried alone, and one that fails again ends with
        `finish_reason="error"`; so does one whose token cannot be chosen or decoded.

        Raises:
            Exception: the step was interrupted, or blocks could not be copied. No output is lost,
                and the step can be repeated.
        """
        with self.owner:
            self._advance()
        return self.table.take_outputs()

    def advance(self, inboxes: Mapping[str, deque[Output]]) -> None:
        """Compute one batch, unless an inbox has something once it is this thread's turn.

        Args:
            inboxes: by the ids of their requests.

        Raises:
            RuntimeError: none of these requests is left, so nothing can come.
            Exception: as for `step`, which returns the outputs of requests without an inbox.
        """
        with self.owner:
            is_over = not any(name in self.table.requests for name in inboxes)
            if not is_over and not any(inboxes.values()):
                self._advance()
        if is_over and not any(inboxes.values()):
            raise RuntimeError(f"the engine has no request {', '.join(inboxes)}")

    def forward(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """Run the model on another KV cache, between two steps; otherwise as `Decoder.forward`.

        Raises:
            RuntimeError: the engine is closed.
        """
        with self.owner:
            self.check_open()
            return self.model.forward(batch, kv_cache)

    def abort(self, request_id: str) -> list[Output]:
        """End a request now and free its blocks; an unknown or finished one is ignored.

        From inside a step, as in a signal handler, it takes effect after the step.

        Returns:
            The last output of each of its unfinished samples, with any text held back so far.
        """
        if self.owner.is_inside():
            self._discarded.append(request_id)
            return []
        with self.owner:
            self._drop_discarded()
            return self._abort(request_id)

    def discard(self, request_id: str) -> None:
        """End a request whose outputs nobody wants, without waiting: now or before the next step.

        It may be called anywhere: in a finalizer, a signal handler, another thread.
        """
        self._discarded.append(request_id)
        if self.owner.is_free():
            with self.owner:
                self._drop_discarded()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, after a step under way.

        Requests under way keep what they have computed, but nobody finds it any more. What has been
        written is not proposed any more to requests that come (`speculation`).

        Returns:
            Whether the whole KV cache is free: no request holds a part of it.
        """
        with self.owner:
            self._drop_discarded()
            return self.steps.reset_prefix_cache()

    def has_unfinished(self) -> bool:
        """Return whether another step would compute something or return an output."""
        return bool(self.table.requests or self.table.outputs)

    def progress(self, request_id: str) -> tuple[int, int]:
        """Return how far an unfinished prompt is: (tokens computed, tokens of the prompt)."""
        sequence = self.table.requests[request_id].samples[0].sequence
        return min(sequence.num_computed, sequence.prompt_len), sequence.prompt_len

    def stats(self) -> dict[str, Any]:
        """Return current gauges (running, waiting, KV use), and totals since the start.

        Under "histograms" are those of times and lengths, each as {"buckets": [(bound, values up to
        it)], "count": ..., "sum": ...}; under "finish_reasons" is how many outputs ended why.
        It does not wait for a step under way in another thread.
        """
        if self.owner.is_free():
            with self.owner:
                self._drop_discarded()
        blocks, steps = self.scheduler.blocks, self.steps
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "pending_prompt_tokens": self.scheduler.num_pending_tokens,
            "kv_blocks": blocks.num_blocks,
            "kv_blocks_free": blocks.num_free,
            "kv_usage": 1.0 - blocks.num_free / blocks.num_blocks,
            "preemptions": self.scheduler.num_preemptions,
            "prefix_queried_tokens": blocks.num_queried_tokens,
            "prefix_hit_tokens": blocks.num_hit_tokens,
            "prefix_partial_hit_tokens": blocks.num_partial_hit_tokens,
            **({} if self._persistence is None else self._persistence.stats()),
            **asdict(steps.totals),
            **steps.metrics.snapshot(),
        }

    def check_open(self) -> None:
        """Raise RuntimeError if the engine is closed."""
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")

    def close(self) -> None:
        """Abort unfinished requests, after a step under way, and accept no further ones."""
        with self.owner:
            self._closed = True
            for request_id in list(self.table.requests):
                self._abort(request_id)
            if self._persistence is not None:
                self._persistence.close()

    def _reason_to_refuse(self, request: Request) -> Exception | None:
        try:
            self.check_open()
            self.check_queue(request.samples[0].sequence.prompt_len)
        except RuntimeError as error:
            return error
        if request.request_id in self.table.requests:
            return ValueError(
                f"request_id {request.request_id!r} is in use by an unfinished request"
            )
        return None

    def _advance(self) -> None:
        self._drop_discarded()
        if self.table.requests:
            self.steps.advance(self.on_step)

    def _drop_discarded(self) -> None:
        while self._discarded:
            self._abort(self._discarded[0])
            del self._discarded[0]

    def _abort(self, request_id: str) -> list[Output]:
        request = self.table.requests.get(request_id)
        if request is None:
            return []
        outputs = request.end("abort")
        request.measure(outputs, perf_counter())
        self.steps.metrics.count_finished(outputs)
        if request.inbox is not None:
            request.inbox += outputs
        self.table.remove(request)
        return outputs
