"""Requests in, tokens out: one step schedules, computes and samples for all of them.

A request's output is a function of its tokens, its parameters and its seed; other requests, the
order of calls and the threads they come from do not change it.

Each method has the engine to itself (`Owner`), and whatever is raised in it, nothing is lost: what
is known of a request are its tokens, which of them are in the cache, and its outputs. They change
together, by plain assignments; everything else is computed anew from them (`_recover`).
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np

from codellama_rt.engine.admission import Admission, checked_seconds, checked_tokens
from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.metrics import EngineMetrics, StepRecord
from codellama_rt.engine.owner import Owner
from codellama_rt.engine.request import Output, Request, Sample
from codellama_rt.engine.sampler import Choice, choose
from codellama_rt.engine.sampling_params import (
    LogitsProcessor,
    SamplingParams,
)
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Chunk, Sequence
from codellama_rt.engine.step_cost import StepCost
from codellama_rt.engine.stop_strings import Tokenizer
from codellama_rt.errors import QueueFullError
from codellama_rt.model.batch import Batch
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.model.lora import LoraAdapter

if TYPE_CHECKING:
    from codellama_rt.engine.prefix_store import PrefixStore

logger = logging.getLogger(__name__)


class Search(Protocol):
    """What computes on the engine's blocks beside its requests: `Branches`.

    Attributes:
        live: the sequences that have or want blocks.
        is_computing: whether some of them are to be computed.
    """

    live: Mapping[Sequence, Any]
    is_computing: bool

    def give_way(self) -> bool:
        """Free some blocks that can be spared, and return whether there were any."""

    def recover(self) -> None:
        """Make good what an exception has left half done."""


class _InFlight(NamedTuple):
    """A sample that is taking its logits, and what it had before."""

    sample: Sample
    num_tokens: int
    num_samples: int  # of its request


class _Result(NamedTuple):
    """What a step has for one of its chunks."""

    logits: np.ndarray | Exception  # (num_logits, vocab_size) float32, or what the model raised
    choice: Choice | Exception | None = None  # of the token after them; None: not chosen yet


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
            prefix_store: where prefixes are kept beyond this engine's life; needs prefix_caching,
                and a KV cache in host memory.
        """
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
        self._requests: dict[str, Request] = {}  # unfinished
        self._samples: dict[Sequence, Sample] = {}  # unfinished and forked
        self.searches: WeakSet[Search] = WeakSet()  # others that use the same blocks
        self.owner = Owner(self._recover)
        self._in_flight: _InFlight | None = None
        self._outputs: list[Output] = []  # for the next `step`
        self._discarded: deque[str] = deque()  # requests to end before anything else
        self._num_arrived = 0
        self._totals = _Totals()
        self._metrics = EngineMetrics()
        self._closed = False
        self._persistence = None
        if prefix_store is not None:
            from codellama_rt.engine.persistence import Persistence  # most engines have none

            self._persistence = Persistence(prefix_store, kv_cache, self.scheduler, self.admission)
            self.searches.add(self._persistence.restorer)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: LoraAdapter | None = None,
        inbox: deque[Output] | None = None,
    ) -> None:
        """Queue a request; `step` returns its outputs.

        Args:
            request_id: unique among the unfinished requests.
            prompt_token_ids: at least one token id.
            params: how to sample; None: greedy.
            priority: smaller goes first; equal priorities are served in order of arrival.
            adapter: applied to the tokens of this request only.
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
            request_id, prompt_token_ids, params, priority=priority, adapter=adapter, inbox=inbox
        )
        self.submit(request)

    def submit(self, request: Request) -> None:
        """Queue a request of `admission.make_request`; raises as `add_request` does."""
        with self.owner:
            self._drop_discarded()
            error = self._reason_to_refuse(request)
            if error is None:
                sequence = request.samples[0].sequence
                sequence.order = sequence.order[0], self._num_arrived, 0
                self._add(request)
        if error is not None:
            raise error

    def check_queue(self, num_tokens: int) -> None:
        """Raise QueueFullError if so many more prompt tokens are more than may wait.

        It may be called in any thread, also while a step is under way.
        """
        pending = self.scheduler.num_pending_tokens
        if self.max_queued_tokens is not None and pending + num_tokens > self.max_queued_tokens:
            raise QueueFullError(pending, self.max_queued_tokens, self.backlog_seconds())

    def backlog_seconds(self) -> float | None:
        """Return how long the prompts that wait will take, by what steps have cost so far.

        Returns:
            Seconds, or None if the engine does not measure the cost of its steps.
        """
        return self.scheduler.backlog_seconds()

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
        outputs, self._outputs = self._outputs, []
        return outputs

    def advance(self, inboxes: Mapping[str, deque[Output]]) -> None:
        """Compute one batch, unless an inbox has something once it is this thread's turn.

        Args:
            inboxes: by the ids of their requests.

        Raises:
            RuntimeError: none of these requests is left, so nothing can come.
            Exception: as for `step`, which returns the outputs of requests without an inbox.
        """
        with self.owner:
            is_over = not any(name in self._requests for name in inboxes)
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

    def compute(self, chunks: Collection[Chunk]) -> list[np.ndarray]:
        """Run the model once; for the owner only. Blocks to be copied have been.

        Args:
            chunks: of `scheduler`, or of another scheduler over the same blocks.

        Returns:
            Per chunk (num_logits, vocab_size) float32.
        """
        return _by_chunk(chunks, self._compute(chunks))

    def _compute(self, chunks: Collection[Chunk]) -> np.ndarray:
        """Run the model once; return (sum of num_logits, vocab_size) float32, chunk after chunk."""
        started = perf_counter()
        has_lengths = self.admission.has_dynamic_rope
        batch = build_batch(chunks, self.kv_cache.block_size, rope_lengths=has_lengths)
        scheduled = perf_counter()
        logits = self.model.forward(batch, self.kv_cache)
        seconds = perf_counter() - scheduled
        totals = self._totals
        totals.steps += 1
        totals.computed_tokens += len(batch.token_ids)
        totals.schedule_seconds += scheduled - started
        totals.model_seconds += seconds
        if self.scheduler.cost is not None:
            self.scheduler.cost.learn(chunks, seconds)
        return logits

    def copy_blocks(self) -> None:
        """Copy the blocks that forks are about to write; for the owner only."""
        blocks = self.scheduler.blocks
        if blocks.copies:
            pairs = [(source, to) for to, source in blocks.copies.items()]
            self.kv_cache.copy_blocks(np.array(pairs, np.int32))
            blocks.copied()

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

    def has_unfinished(self) -> bool:
        """Return whether another step would compute something or return an output."""
        return bool(self._requests or self._outputs)

    def progress(self, request_id: str) -> tuple[int, int]:
        """Return how far an unfinished prompt is: (tokens computed, tokens of the prompt)."""
        sequence = self._requests[request_id].samples[0].sequence
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
        blocks, totals = self.scheduler.blocks, self._totals
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
            **{name: getattr(totals, name) for name in _Totals.__slots__},
            **({} if self._persistence is None else self._persistence.stats()),
            **self._metrics.snapshot(),
        }

    def check_open(self) -> None:
        """Raise RuntimeError if the engine is closed."""
        if self._closed:
            raise RuntimeError("the engine is closed; make a new one")

    def close(self) -> None:
        """Abort unfinished requests, after a step under way, and accept no further ones."""
        with self.owner:
            self._closed = True
            for request_id in list(self._requests):
                self._abort(request_id)
            if self._persistence is not None:
                self._persistence.close()

    def _reason_to_refuse(self, request: Request) -> Exception | None:
        try:
            self.check_open()
            self.check_queue(request.samples[0].sequence.prompt_len)
        except RuntimeError as error:
            return error
        if request.request_id in self._requests:
            return ValueError(
                f"request_id {request.request_id!r} is in use by an unfinished request"
            )
        return None

    def _add(self, request: Request) -> None:
        sample = request.samples[0]
        self._num_arrived += 1
        self._totals.prompt_tokens += sample.sequence.prompt_len
        self._requests[request.request_id] = request
        self._samples[sample.sequence] = sample
        self.scheduler.add(sample.sequence)

    def _advance(self) -> None:
        """Make a step; its outputs go to where they are waited for."""
        self._drop_discarded()
        if not self._requests:
            return
        before, started = replace(self._totals), perf_counter()
        if self._persistence is not None:
            self._persistence.restorer.collect()
        self.copy_blocks()  # of a step that was interrupted
        chunks = self.scheduler.schedule()
        if not chunks:
            self._make_room()
        self.copy_blocks()
        for chunk in chunks:
            if chunk.samples:
                self._samples[chunk.sequence].prepare()
        self._totals.schedule_seconds += perf_counter() - started
        results = self._results(chunks)
        computed = perf_counter()
        part = tuple(self._name(chunk) for chunk in chunks) if self.on_step else ()
        for chunk, result in zip(chunks, results, strict=True):
            self._take(chunk, result, started, computed)
        ended = perf_counter()
        spent = (self._totals.model_seconds + self._totals.schedule_seconds) - (
            before.model_seconds + before.schedule_seconds
        )
        self._totals.sample_seconds += ended - started - spent
        self._metrics.step_seconds.observe(ended - started)
        if self.on_step is not None:
            self._report(started, before, part)

    def _name(self, chunk: Chunk) -> tuple[str, int, int, int]:
        sample = self._samples[chunk.sequence]
        return sample.request.request_id, sample.index, chunk.start, chunk.stop

    def _report(
        self, started: float, before: _Totals, chunks: tuple[tuple[str, int, int, int], ...]
    ) -> None:
        """Tell `on_step` of the step that began at `started`, when the totals were `before`."""
        totals = self._totals
        record = StepRecord(
            started,
            totals.schedule_seconds - before.schedule_seconds,
            totals.model_seconds - before.model_seconds,
            totals.sample_seconds - before.sample_seconds,
            chunks,
            len(self.scheduler.running),
            len(self.scheduler.waiting),
        )
        try:
            self.on_step(record)
        except Exception:
            logger.exception("on_step raised; the engine goes on")

    def _results(self, chunks: list[Chunk]) -> list[_Result]:
        """Return what comes of each chunk."""
        if not chunks:
            return []
        try:
            logits = self._compute(chunks)
        except Exception as error:  # of one of them, or a passing one
            logger.warning("a step failed and is repeated sequence by sequence: %r", error)
            return [_Result(self._result(chunk)) for chunk in chunks]
        choices = self._choices(chunks, logits)
        rows = _by_chunk(chunks, logits)
        return [_Result(its, choices.get(i)) for i, its in enumerate(rows)]

    def _choices(self, chunks: list[Chunk], logits: np.ndarray) -> dict[int, Choice | Exception]:
        """Return the tokens that all sequences can choose together, by the numbers of chunks."""
        ends = list(itertools.accumulate(chunk.num_logits for chunk in chunks))
        samples = [self._samples[chunk.sequence] for chunk in chunks]
        together = [
            i
            for i, (sample, chunk) in enumerate(zip(samples, chunks, strict=True))
            if sample.request.takes_one_token(chunk)
        ]
        try:
            choices = choose(
                [samples[i].sampler for i in together],
                logits,
                [chunks[i].stop for i in together],
                [ends[i] - 1 for i in together],
            )
        except Exception as error:  # perhaps a passing one: each will choose alone
            logger.warning("tokens could not be chosen together: %r", error)
            return {}
        return dict(zip(together, choices, strict=True))

    def _result(self, chunk: Chunk) -> np.ndarray | Exception:
        try:
            [logits] = self.compute([chunk])
        except Exception as error:
            return error
        return logits

    def _make_room(self) -> None:
        """Wait for prefixes being read, or have searches give up blocks they can do without."""
        if self._persistence is not None and self._persistence.restorer.wait():
            return
        searches = list(self.searches)
        if not any(search.give_way() or search.is_computing for search in searches):
            raise RuntimeError("the scheduler found nothing to do for unfinished requests")

    def _take(self, chunk: Chunk, found: _Result, started: float, now: float) -> None:
        """Give a sequence its logits of a step from `started` to `now`, or end it with an error."""
        sample = self._samples[chunk.sequence]
        request, sequence, num_samples = sample.request, chunk.sequence, len(sample.request.samples)
        first_logit = max(sequence.first_logit, chunk.stop)
        in_flight = _InFlight(sample, len(sequence.token_ids), num_samples)
        self._in_flight = in_flight
        result: Any = found.logits
        if not isinstance(result, Exception):
            result = self._gained(request, chunk, found)
        if isinstance(result, Exception):
            gained, num_computed = request.fail(sample, result), sequence.num_computed
        else:
            gained, num_computed = result, chunk.stop
        sample.num_steps += 1
        request.clock.note(chunk.start, started, now, has_token=bool(gained))
        request.measure(gained, now)
        # No call stands between these lines, so that no exception can.
        if request.inbox is None:
            self._outputs += gained
        else:
            request.inbox += gained
        sequence.num_computed = num_computed
        sequence.first_logit = first_logit
        self._in_flight = None

        self._totals.generated_tokens += sum(len(output.token_ids) for output in gained)
        self._metrics.count(gained)
        self.scheduler.blocks.index_full_blocks(sequence)
        forks = request.samples[num_samples:]
        for fork in forks:
            self._samples[fork.sequence] = fork
            self.scheduler.add_fork(sequence, fork.sequence)
        for one in (sample, *forks):
            if one.is_finished:
                self._free(one)
        if request.is_finished:
            del self._requests[request.request_id]

    def _gained(self, request: Request, chunk: Chunk, found: _Result) -> list[Output] | Exception:
        """Return what a request gains by its logits, or what was raised twice over them."""
        sample = self._in_flight.sample
        try:
            return request.take(sample, chunk, found.logits, found.choice)
        except Exception:  # perhaps a passing one
            self._undo()
        try:
            return request.take(sample, chunk, found.logits)
        except Exception as error:
            self._undo()
            return error

    def _undo(self) -> None:
        """Go back to before the sample in flight took its logits."""
        sample, num_tokens, num_samples = self._in_flight
        sample.request.undo(sample, num_tokens, num_samples)

    def _recover(self) -> None:
        """Make good what an exception has left half done."""
        if self._in_flight is not None:
            self._undo()
            self._in_flight = None
        requests = {name: r for name, r in self._requests.items() if not r.is_finished}
        samples = [sample for request in requests.values() for sample in request.samples]
        self._requests = requests
        self._samples = {sample.sequence: sample for sample in samples if not sample.is_finished}
        searches = list(self.searches)
        branches = [branch for search in searches for branch in search.live]
        self.scheduler.blocks.recover([*self._samples, *branches])
        self.scheduler.recover(self._samples)
        for search in searches:
            search.recover()

    def _drop_discarded(self) -> None:
        while self._discarded:
            self._abort(self._discarded[0])
            del self._discarded[0]

    def _abort(self, request_id: str) -> list[Output]:
        request = self._requests.get(request_id)
        if request is None:
            return []
        outputs = request.end("abort")
        request.measure(outputs, perf_counter())
        self._metrics.count(outputs)
        if request.inbox is not None:
            request.inbox += outputs
        del self._requests[request_id]
        for sample in request.samples:
            if sample.sequence in self._samples:
                self._free(sample)
        return outputs

    def _free(self, sample: Sample) -> None:
        self.scheduler.remove(sample.sequence)
        del self._samples[sample.sequence]


def _by_chunk(chunks: Collection[Chunk], logits: np.ndarray) -> list[np.ndarray]:
    ends = itertools.accumulate(chunk.num_logits for chunk in chunks)
    return [logits[end - chunk.num_logits : end] for chunk, end in zip(chunks, ends, strict=True)]
