"""The engine's steps: schedule, compute, choose, and give each sample what it has gained.

Whatever is raised in a step, nothing is lost: what is known of a request are its tokens, which of
them are in the cache, and its outputs. They change together, by plain assignments; everything else
is computed anew from them (`recover`).
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.logprobs import Logprob
from codellama_rt.engine.metrics import EngineMetrics, StepRecord
from codellama_rt.engine.output import Output
from codellama_rt.engine.request import Request
from codellama_rt.engine.request_table import RequestTable
from codellama_rt.engine.sample import Sample
from codellama_rt.engine.sampler import SamplerRows
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Chunk
from codellama_rt.engine.sequence import Sequence as Tokens
from codellama_rt.engine.speculation import Speculation
from codellama_rt.model.interface import Decoder, KVCache

logger = logging.getLogger(__name__)


class Search(Protocol):
    """What computes on the engine's blocks beside its requests: `Branches`.

    Attributes:
        live: the sequences that have or want blocks.
        is_computing: whether some of them are to be computed.
    """

    live: Mapping[Tokens, Any]
    is_computing: bool

    def give_way(self) -> bool:
        """Free some blocks that can be spared, and return whether there were any."""

    def recover(self) -> None:
        """Make good what an exception has left half done."""


@dataclass(slots=True)
class Totals:
    """What all steps have done so far."""

    steps: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0
    sample_seconds: float = 0.0


class _Computed(NamedTuple):
    """What a step has for its chunks.

    Attributes:
        logits: per chunk (num_logits, vocab_size) float32, or what the model raised over it.
        token_ids: per chunk, where all sequences have chosen together.
        failed: numbers of the chunks for which that has failed.
        logprobs: of chosen tokens, where asked for, by the numbers of their chunks.
    """

    logits: Sequence[np.ndarray | Exception]
    token_ids: Sequence[int | None]
    failed: Collection[int] = ()
    logprobs: Mapping[int, dict[int, Logprob]] = {}


class Steps:
    """Make the steps of an engine; for its owner only.

    Attributes:
        searches: others that use the same blocks.
        totals: what the steps have done.
        metrics: histograms of it.
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: KVCache,
        scheduler: Scheduler,
        table: RequestTable,
        *,
        has_dynamic_rope: bool,
        speculation: Speculation | None = None,
    ) -> None:
        """Take the engine's parts; `table` holds the scheduler's requests."""
        self.searches: WeakSet[Search] = WeakSet()
        self.totals = Totals()
        self.metrics = EngineMetrics()
        self._model, self._kv_cache, self._has_dynamic_rope = model, kv_cache, has_dynamic_rope
        self._scheduler, self._table, self.speculation = scheduler, table, speculation
        if speculation is not None:
            scheduler.propose = self._propose
        # The sample that is taking its logits; its tokens, and the samples of its request, before.
        self._in_flight: tuple[Sample, int, int] | None = None
        self._rows = SamplerRows([])  # of the last step

    def advance(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Make a step; its outputs go to where they are waited for.

        Raises:
            Exception: it was interrupted, or blocks could not be copied; it can be repeated.
        """
        totals, started = self.totals, perf_counter()
        before = totals.schedule_seconds, totals.model_seconds
        self.copy_blocks()  # of a step that was interrupted
        chunks = self._scheduler.schedule()
        if not chunks:
            self._make_room()
        self.copy_blocks()
        samples = [self._table.samples[chunk.sequence] for chunk in chunks]
        for chunk, sample in zip(chunks, samples, strict=True):
            if sample.has_grammar and chunk.samples:
                sample.sampler.prepare()
        totals.schedule_seconds += perf_counter() - started
        found = self._computed(chunks, samples)
        computed = perf_counter()
        self._deliver(chunks, samples, found, started, computed)
        ended = perf_counter()
        schedule_seconds = totals.schedule_seconds - before[0]
        model_seconds = totals.model_seconds - before[1]
        sample_seconds = ended - started - schedule_seconds - model_seconds
        totals.sample_seconds += sample_seconds
        self.metrics.step_seconds.observe(ended - started)
        if on_step is not None:
            self._report(
                on_step, started, (schedule_seconds, model_seconds, sample_seconds), chunks, samples
            )

    def compute(self, chunks: Collection[Chunk]) -> list[np.ndarray]:
        """Run the model once. Blocks to be copied have been.

        Args:
            chunks: of the scheduler, or of another one over the same blocks.

        Returns:
            Per chunk (num_logits, vocab_size) float32.
        """
        return _by_chunk(chunks, self._compute(chunks))

    def copy_blocks(self) -> None:
        """Copy the blocks that forks are about to write."""
        blocks = self._scheduler.blocks
        if blocks.copies:
            pairs = [(source, to) for to, source in blocks.copies.items()]
            self._kv_cache.copy_blocks(np.array(pairs, np.int32))
            blocks.copied()

    def recover(self) -> None:
        """Make good what an exception has left half done."""
        if self._in_flight is not None:
            self._undo()
            self._in_flight = None
        self._table.recover()
        searches = list(self.searches)
        branches = [branch for search in searches for branch in search.live]
        self._scheduler.blocks.recover([*self._table.samples, *branches])
        self._scheduler.recover(self._table.samples)
        for search in searches:
            search.recover()

    def _compute(self, chunks: Collection[Chunk]) -> np.ndarray:
        """Run the model once; return (sum of num_logits, vocab_size) float32, chunk after chunk."""
        started = perf_counter()
        size, has_lengths = self._kv_cache.block_size, self._has_dynamic_rope
        batch = build_batch(chunks, size, rope_lengths=has_lengths)
        scheduled = perf_counter()
        logits = self._model.forward(batch, self._kv_cache)
        seconds = perf_counter() - scheduled
        totals = self.totals
        totals.steps += 1
        totals.computed_tokens += len(batch.token_ids)
        totals.schedule_seconds += scheduled - started
        totals.model_seconds += seconds
        if self._scheduler.cost is not None:
            self._scheduler.cost.learn(chunks, seconds)
        if self.speculation is not None:
            self.speculation.learn(chunks, seconds)
        return logits

    def _propose(self, sequences: list[Tokens], most: int) -> list[array]:
        """Return the tokens that decodes compute besides, at most so many."""
        samples = [self._table.samples[sequence] for sequence in sequences]
        for sample in samples:
            sequence, request = sample.sequence, sample.request
            if sample.drafter is None and sequence.num_generated:  # before, it may fork
                text = request.prompt_text()
                sample.drafter = self.speculation.drafter(sequence, request.max_len, text)
        return self.speculation.propose(sequences, [one.drafter for one in samples], most)

    def _computed(self, chunks: list[Chunk], samples: list[Sample]) -> _Computed:
        """Run the model, and choose the tokens that can be chosen together."""
        if not chunks:
            return _Computed((), ())
        try:
            logits = self._compute(chunks)
        except Exception as error:  # of one of them, or a passing one
            logger.warning("a step failed and is repeated sequence by sequence: %r", error)
            return _Computed([self._result(chunk) for chunk in chunks], [None] * len(chunks))
        rows = _by_chunk(chunks, logits)
        try:
            return self._choose(chunks, samples, logits, rows)
        except Exception as error:  # perhaps a passing one: each will choose alone
            logger.warning("tokens could not be chosen together: %r", error)
            return _Computed(rows, [None] * len(chunks))

    def _result(self, chunk: Chunk) -> np.ndarray | Exception:
        chunk.drop_draft()  # it may be what has failed
        try:
            [logits] = self.compute([chunk])
        except Exception as error:
            return error
        return logits

    def _choose(
        self,
        chunks: list[Chunk],
        samples: list[Sample],
        logits: np.ndarray,
        rows: list[np.ndarray],
    ) -> _Computed:
        """Choose for the chunks whose last logits only choose a token."""
        together = [
            i
            for i, (chunk, sample) in enumerate(zip(chunks, samples, strict=True))
            if sample.request.takes_one_token(chunk)
        ]
        samplers = [samples[i].sampler for i in together]
        if samplers != self._rows.samplers:
            self._rows = SamplerRows(samplers)
        ends = list(itertools.accumulate(chunk.num_logits for chunk in chunks))
        chosen = self._rows.choose(
            logits, [chunks[i].stop for i in together], [ends[i] - 1 for i in together]
        )
        token_ids: list[int | None] = [None] * len(chunks)
        for i, token_id in zip(together, chosen.token_ids, strict=True):
            token_ids[i] = token_id
        failed = {together[k] for k in chosen.failed}
        for i in failed:
            token_ids[i] = None
        logprobs = {together[k]: its for k, its in chosen.logprobs.items()}
        return _Computed(rows, token_ids, failed, logprobs)

    def _make_room(self) -> None:
        """Have searches give up blocks they can do without; they compute them again."""
        searches = list(self.searches)
        if not any(search.give_way() or search.is_computing for search in searches):
            raise RuntimeError("the scheduler found nothing to do for unfinished requests")

    def _deliver(
        self,
        chunks: list[Chunk],
        samples: list[Sample],
        found: _Computed,
        started: float,
        now: float,
    ) -> None:
        """Give each sequence what a step from `started` to `now` has for it."""
        gained: list[Output] = []
        block_size = self._kv_cache.block_size
        for i, (chunk, sample, token_id) in enumerate(
            zip(chunks, samples, found.token_ids, strict=True)
        ):
            sequence, request = chunk.sequence, sample.request
            sample.num_steps += 1
            if request.clock.first_token is None:
                has_token = chunk.samples
                request.clock.note(chunk.start, started, now, has_token=has_token)
            output = None
            if token_id is not None:
                self._in_flight = sample, chunk.stop, request.params.n
                try:
                    output = sample.accept(token_id, now, found.logprobs.get(i))
                except Exception:  # perhaps a passing one
                    self._undo()
            if output is None:
                tries = 1 if token_id is not None or i in found.failed else 2
                gained += self._take(chunk, sample, found.logits[i], now, tries)
                continue
            # No call stands between these lines, so that no exception can.
            if request.inbox is None:
                self._table.outputs += (output,)
            else:
                request.inbox += (output,)
            sequence.num_computed = chunk.stop
            self._in_flight = None

            gained += (output,)
            sample.last_token = now
            if chunk.stop // block_size > sequence.num_indexed_blocks:
                self._scheduler.blocks.index_full_blocks(sequence)
            if output.finished:
                self._settle(request, [sample])
        self.totals.generated_tokens += sum([len(output.token_ids) for output in gained])
        self.metrics.count(gained)

    def _take(
        self,
        chunk: Chunk,
        sample: Sample,
        logits: np.ndarray | Exception,
        now: float,
        tries: int,
    ) -> list[Output]:
        """Give one sequence its logits, or end it with an error; return what comes of it."""
        request, sequence, num_samples = sample.request, chunk.sequence, len(sample.request.samples)
        self._in_flight = sample, len(sequence.token_ids), num_samples
        result: Any = logits
        if not isinstance(result, Exception):
            result = self._gained(chunk, sample, logits, now, tries)
        if isinstance(result, Exception):
            gained, num_computed = request.fail(sample, result), sequence.num_computed
        else:
            gained, num_computed = result, chunk.stop
            if chunk.draft:
                num_computed = len(sequence.token_ids) - 1  # behind it is what was not accepted
                self._count_draft(sample, chunk.draft, gained[0])
        request.measure(gained, now)
        # No call stands between these lines, so that no exception can.
        if request.inbox is None:
            self._table.outputs += gained
        else:
            request.inbox += gained
        sequence.num_computed = num_computed
        self._in_flight = None

        self._scheduler.blocks.index_full_blocks(sequence)
        forks = request.samples[num_samples:]
        self._table.add_forks(sample, forks)
        self._settle(request, [sample, *forks])
        return gained

    def _settle(self, request: Request, samples: list[Sample]) -> None:
        """Drop samples that have ended; their outputs may be copied by others."""
        if self.speculation is not None:
            for sample in samples:
                if sample.is_finished:
                    self.speculation.remember(sample.sequence)
        self._table.settle(request, samples)

    def _count_draft(self, sample: Sample, draft: Collection[int], output: Output) -> None:
        pairs = zip(draft, output.token_ids, strict=False)
        num_accepted = sum(proposed == token_id for proposed, token_id in pairs)
        sample.num_drafted += len(draft)
        sample.num_accepted += num_accepted
        output.draft_tokens, output.accepted_tokens = sample.num_drafted, sample.num_accepted
        self.totals.draft_tokens += len(draft)
        self.totals.accepted_tokens += num_accepted

    def _gained(
        self, chunk: Chunk, sample: Sample, logits: np.ndarray, now: float, tries: int
    ) -> list[Output] | Exception:
        """Return what a request gains by its logits, or what was raised over them at last."""
        for _ in range(tries):
            try:
                return sample.request.take(sample, chunk, logits, now)
            except Exception as error:  # perhaps a passing one
                self._undo()
                raised = error
                logits = logits[: len(logits) - len(chunk.draft)]
                chunk.drop_draft()
        return raised

    def _undo(self) -> None:
        """Go back to before the sample in flight took its logits."""
        sample, num_tokens, num_samples = self._in_flight
        sample.request.undo(sample, num_tokens, num_samples)

    def _report(
        self,
        on_step: Callable[[StepRecord], None],
        started: float,
        seconds: tuple[float, float, float],
        chunks: list[Chunk],
        samples: list[Sample],
    ) -> None:
        """Tell `on_step` of the step that began at `started`."""
        parts = tuple(
            (sample.request.request_id, sample.index, chunk.start, chunk.stop)
            for chunk, sample in zip(chunks, samples, strict=True)
        )
        running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        try:
            on_step(StepRecord(started, *seconds, parts, running, waiting))
        except Exception:
            logger.exception("on_step raised; the engine goes on")


def _by_chunk(chunks: Collection[Chunk], logits: np.ndarray) -> list[np.ndarray]:
    ends = itertools.accumulate(chunk.num_logits for chunk in chunks)
    return [logits[end - chunk.num_logits : end] for chunk, end in zip(chunks, ends, strict=True)]
