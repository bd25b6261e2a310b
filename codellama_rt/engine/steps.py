"""The engine's steps: schedule, compute, choose, and give each sample what it has gained."""

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
from codellama_rt.engine.delivery import Delivery
from codellama_rt.engine.lineup import Lineup
from codellama_rt.engine.metrics import EngineMetrics, StepRecord
from codellama_rt.engine.request_table import RequestTable
from codellama_rt.engine.sampler import Chosen
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Chunk
from codellama_rt.engine.sequence import Sequence as Tokens
from codellama_rt.engine.speculation import Speculation
from codellama_rt.model.batch import Batch
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
        logits: (sum of num_logits, vocab_size) float32, chunk after chunk; or per chunk its own, or
            what the model raised over it.
        chosen: the tokens that the lineup has chosen; None: each sample chooses alone.
    """

    logits: np.ndarray | list[np.ndarray | Exception]
    chosen: Chosen | None = None

    def by_chunk(self, chunks: Collection[Chunk]) -> Sequence[np.ndarray | Exception]:
        """Return the logits per chunk."""
        return self.logits if isinstance(self.logits, list) else _by_chunk(chunks, self.logits)


class Steps:
    """Make the steps of an engine; for its owner only.

    Attributes:
        searches: others that use the same blocks.
        totals: what the steps have done.
        metrics: histograms of it.
        speculation: what proposes tokens for them; None: nothing does.
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
        self._delivery = Delivery(table, scheduler.blocks, self.metrics, speculation)
        self._lineup = Lineup([], [])  # of the last step

    def advance(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Make a step; its outputs go to where they are waited for.

        Raises:
            Exception: it was interrupted, or blocks could not be copied; it can be repeated.
        """
        totals, started = self.totals, perf_counter()
        schedule_seconds, model_seconds = totals.schedule_seconds, totals.model_seconds
        self.copy_blocks()  # of a step that was interrupted
        chunks = self._scheduler.schedule()
        if not chunks:
            self._make_room()
        self.copy_blocks()
        others = self._line_up(chunks)
        parts = self._names(chunks) if on_step is not None else ()
        totals.schedule_seconds += perf_counter() - started
        if chunks:
            found = self._computed(chunks, others)
            self._deliver(chunks, others, found, started)
        seconds = perf_counter() - started
        schedule_seconds = totals.schedule_seconds - schedule_seconds
        model_seconds = totals.model_seconds - model_seconds
        sample_seconds = seconds - schedule_seconds - model_seconds
        totals.sample_seconds += sample_seconds
        self.metrics.step_seconds.observe(seconds)
        if on_step is not None:
            times = started, schedule_seconds, model_seconds, sample_seconds
            self._report(on_step, times, parts)

    def compute(self, chunks: Collection[Chunk]) -> list[np.ndarray]:
        """Run the model once. Blocks to be copied have been.

        Args:
            chunks: of the scheduler, or of another one over the same blocks.

        Returns:
            Per chunk (num_logits, vocab_size) float32.
        """
        started = perf_counter()
        batch = build_batch(chunks, self._kv_cache.block_size, rope_lengths=self._has_dynamic_rope)
        return _by_chunk(chunks, self._forward(batch, started))

    def copy_blocks(self) -> None:
        """Copy the blocks that forks are about to write."""
        blocks = self._scheduler.blocks
        if blocks.copies:
            pairs = [(source, to) for to, source in blocks.copies.items()]
            self._kv_cache.copy_blocks(np.array(pairs, np.int32))
            blocks.copied()

    def recover(self) -> None:
        """Make good what an exception has left half done."""
        self._delivery.recover()
        self._lineup = Lineup([], [])
        self._table.recover()
        self._scheduler.blocks.recover(self._sequences())
        self._scheduler.recover(self._table.samples)
        for search in list(self.searches):
            search.recover()

    def reset_prefix_cache(self) -> bool:
        """Forget prefixes, and outputs to be copied; return whether no sequence has blocks."""
        if self.speculation is not None:
            self.speculation.corpora.clear()
        return self._scheduler.blocks.reset_prefix_cache(self._sequences())

    def _sequences(self) -> list[Tokens]:
        """Return all that have or want blocks."""
        branches = [branch for search in list(self.searches) for branch in search.live]
        return [*self._table.samples, *branches]

    def _line_up(self, chunks: list[Chunk]) -> list[int]:
        """Line up the samples that choose one token; return the numbers of the other chunks."""
        others = []
        if not self._lineup.goes_on(chunks):
            samples = [self._table.samples[chunk.sequence] for chunk in chunks]
            together = [
                sample.request.takes_one_token(chunk)
                for chunk, sample in zip(chunks, samples, strict=True)
            ]
            others = [i for i, is_one in enumerate(together) if not is_one]
            self._lineup = Lineup(
                list(itertools.compress(samples, together)),
                list(itertools.compress(chunks, together)),
                self._lineup.rows,
            )
        self._lineup.prepare()
        return others

    def _propose(self, sequences: list[Tokens], most: int) -> list[array]:
        """Return the tokens that decodes compute besides, at most so many."""
        samples = [self._table.samples[sequence] for sequence in sequences]
        for sample in samples:
            sequence, request = sample.sequence, sample.request
            if sample.drafter is None and sequence.num_generated:  # before, it may fork
                text = request.prompt_text()
                sample.drafter = self.speculation.drafter(sequence, request.max_len, text)
        return self.speculation.propose(sequences, [one.drafter for one in samples], most)

    def _batch(self, chunks: list[Chunk], others: list[int]) -> Batch:
        """Return the batch of a step."""
        size, has_lengths = self._kv_cache.block_size, self._has_dynamic_rope
        if others:
            return build_batch(chunks, size, rope_lengths=has_lengths)
        version = self._scheduler.blocks.tables_version
        return self._lineup.next_batch(chunks, size, version, rope_lengths=has_lengths)

    def _forward(self, batch: Batch, started: float) -> np.ndarray:
        """Run the model on a batch that was begun at `started`.

        Returns:
            (sum of num_logits, vocab_size) float32, chunk after chunk.
        """
        scheduled = perf_counter()
        logits = self._model.forward(batch, self._kv_cache)
        seconds = perf_counter() - scheduled
        totals = self.totals
        totals.steps += 1
        totals.computed_tokens += len(batch.token_ids)
        self.metrics.step_tokens.observe(len(batch.token_ids))
        totals.schedule_seconds += scheduled - started
        totals.model_seconds += seconds
        if self._scheduler.cost is not None:
            self._scheduler.cost.learn(batch.positions, batch.seq_lens, seconds)
        if self.speculation is not None:
            self.speculation.learn(batch, seconds)
        return logits

    def _computed(self, chunks: list[Chunk], others: list[int]) -> _Computed:
        """Run the model, and choose the tokens of the lineup."""
        started = perf_counter()
        try:
            logits = self._forward(self._batch(chunks, others), started)
        except Exception as error:  # of one of them, or a passing one
            logger.warning("a step failed and is repeated sequence by sequence: %r", error)
            return _Computed([self._result(chunk) for chunk in chunks])
        rows = None
        if others:
            ends = itertools.accumulate(chunk.num_logits for chunk in chunks)
            rows = [end - 1 for i, end in enumerate(ends) if i not in others]
        try:
            return _Computed(logits, self._lineup.rows.choose(logits, self._lineup.positions, rows))
        except Exception as error:  # perhaps a passing one: each will choose alone
            logger.warning("tokens could not be chosen together: %r", error)
            return _Computed(logits)

    def _result(self, chunk: Chunk) -> np.ndarray | Exception:
        chunk.drop_draft()  # it may be what has failed
        try:
            [logits] = self.compute([chunk])
        except Exception as error:
            return error
        return logits

    def _deliver(
        self, chunks: list[Chunk], others: list[int], found: _Computed, started: float
    ) -> None:
        """Give each sample what a step from `started` until now has for it."""
        lineup, chosen, now = self._lineup, found.chosen, perf_counter()
        left: Collection[int] = others
        failed = () if chosen is None else chosen.failed
        if chosen is None or failed or not self._delivery.give_all(lineup, chosen, started, now):
            left, self._lineup = range(len(chunks)), Lineup([], [])
        else:
            self.totals.generated_tokens += len(lineup.samples)
            if not (others or lineup.newcomers()):
                self._scheduler.repeat(chunks)
        if not left:
            return
        logits = found.by_chunk(chunks)
        have_failed = {lineup.samples[i] for i in failed}
        for i in left:
            sample = self._table.samples[chunks[i].sequence]
            tries = 1 if sample in have_failed else 2
            gained = self._delivery.give(sample, chunks[i], logits[i], started, now, tries)
            self.totals.generated_tokens += gained
            if num_drafted := len(chunks[i].draft):
                self.metrics.drafts[gained - 1] += 1
                for counts in (self.totals, sample.request.clock):
                    counts.draft_tokens += num_drafted
                    counts.accepted_tokens += gained - 1

    def _make_room(self) -> None:
        """Wait for prefixes being read, or have searches give up blocks they can do without."""
        reader = self._scheduler.prefix_reader
        if reader is not None and reader.wait():
            return
        searches = list(self.searches)
        if not any(search.give_way() or search.is_computing for search in searches):
            raise RuntimeError("the scheduler found nothing to do for unfinished requests")

    def _names(self, chunks: list[Chunk]) -> tuple[tuple[str, int, int, int], ...]:
        samples = [self._table.samples[chunk.sequence] for chunk in chunks]
        return tuple(
            (sample.request.request_id, sample.index, chunk.start, chunk.stop)
            for chunk, sample in zip(chunks, samples, strict=True)
        )

    def _report(
        self,
        on_step: Callable[[StepRecord], None],
        times: tuple[float, float, float, float],
        parts: tuple[tuple[str, int, int, int], ...],
    ) -> None:
        """Tell `on_step` of a step."""
        running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        try:
            on_step(StepRecord(*times, parts, running, waiting))
        except Exception:
            logger.exception("on_step raised; the engine goes on")


def _by_chunk(chunks: Collection[Chunk], logits: np.ndarray) -> list[np.ndarray]:
    ends = itertools.accumulate(chunk.num_logits for chunk in chunks)
    return [logits[end - chunk.num_logits : end] for chunk, end in zip(chunks, ends, strict=True)]
