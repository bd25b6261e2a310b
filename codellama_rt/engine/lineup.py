"""Samples that get one token each, step after step, and what of them stays the same.

Most steps compute the next token of the same samples as the step before. What a step needs of each
of them is kept here as arrays and lists, so that a step is some passes over these instead of a
visit to each object: the samplers' parameters, block tables, positions, ends.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from operator import ge

import numpy as np

from codellama_rt.engine.batching import block_tables, build_batch
from codellama_rt.engine.output import Output
from codellama_rt.engine.sample import Sample
from codellama_rt.engine.sampler import Chosen, SamplerRows
from codellama_rt.engine.sequence import Chunk
from codellama_rt.model.batch import Batch

_ONE, _ONE_MORE = np.int32(1), np.uint64(1)


class Lineup:
    """Samples whose chunks have nothing to do with their logits but to choose a token.

    Attributes:
        samples: of different sequences.
        rows: their samplers.
        stops: per sample, the number of its tokens when it chooses.
        positions: the same as (num_samples,) uint64, where the chosen tokens will be.
        num_forks: per sample, the number of samples of its request.
        last_token: when all of them had their last tokens; None: the lineup has not chosen yet.
    """

    def __init__(
        self, samples: Sequence[Sample], chunks: Sequence[Chunk], rows: SamplerRows | None = None
    ) -> None:
        """Line up; `rows` may be those of an earlier lineup of the same samplers."""
        self.samples = list(samples)
        self.stops = [chunk.stop for chunk in chunks]
        self.positions = np.array(self.stops, np.uint64)
        samplers = [sample.sampler for sample in samples]
        is_known = rows is not None and rows.samplers == samplers
        self.rows = rows if is_known else SamplerRows(samplers)
        requests = [sample.request for sample in samples]
        self.num_forks = [request.params.n for request in requests]
        self.last_token: float | None = None
        self._inboxes = [request.inbox for request in requests]
        self._has_inboxes = any(inbox is not None for inbox in self._inboxes)
        self._sequences = [sample.sequence for sample in samples]
        self._token_ids = [sequence.token_ids for sequence in self._sequences]
        self._newcomers = [
            (sample, chunk.start)
            for sample, chunk in zip(samples, chunks, strict=True)
            if not sample.sequence.num_generated
        ]
        self._with_grammar = [sample.sampler for sample in samples if sample.has_grammar]
        self._with_memory = [i for i, sampler in enumerate(samplers) if sampler.has_memory]
        self._with_text = any(sample.has_text for sample in samples)
        self._text_of = [sample.text_of for sample in samples]
        self._with_text_alone = None not in self._text_of
        self._end_ids = frozenset().union(*(request.end_ids for request in requests))
        self._last_stops = [request.max_len - 1 for request in requests]
        self._labels = [
            (
                request.request_id,
                sample.index,
                sample.sequence.prompt_len - 1,
                request.clock,
                sample,
            )
            for sample, request in zip(samples, requests, strict=True)
        ]
        self._chunks: Sequence[Chunk] = ()  # of the last step, if it was for each the next token
        self._chosen: np.ndarray | None = None  # (num_samples,) int32, in that step
        self._batch: Batch | None = None  # of the last step, if the next one follows from it
        self._tables_version = -1
        self._num_steps_left = 0  # before some sequence needs its next block

    def goes_on(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether these chunks are the next token of each sample; then step to them.

        If they are those of the last step, they have been moved on by one token.
        """
        if chunks is self._chunks:
            self._step([stop + 1 for stop in self.stops])
            return True
        if len(chunks) != len(self._sequences):
            return False
        if [chunk.start for chunk in chunks] != self.stops:
            return False
        if [chunk.sequence for chunk in chunks] != self._sequences:
            return False
        stops = [start + 1 for start in self.stops]
        if [chunk.stop for chunk in chunks] != stops or list(map(len, self._token_ids)) != stops:
            return False
        self._step(stops)
        self._chunks = chunks
        return True

    def _step(self, stops: list[int]) -> None:
        self.stops, self._newcomers = stops, []
        self.positions = self.positions + _ONE_MORE

    def next_batch(
        self, chunks: Sequence[Chunk], block_size: int, tables_version: int, *, rope_lengths: bool
    ) -> Batch:
        """Return the batch of these chunks, one per sample in their order.

        Args:
            chunks: those that the lineup began with, or for which it goes on.
            block_size: tokens per block of the KV cache.
            tables_version: of the block manager.
            rope_lengths: as of `build_batch`.
        """
        last, tables_are_known = self._batch, tables_version == self._tables_version
        if last is None:
            batch = build_batch(chunks, block_size, rope_lengths=rope_lengths)
            self._num_steps_left = block_size - int((batch.positions % block_size).max())
        else:
            batch = self._following(last)
            if not (tables_are_known and self._num_steps_left):
                self._find_slots(batch, chunks, block_size)
        self._num_steps_left -= 1
        self._tables_version = tables_version
        can_follow = not (batch.adapted or rope_lengths) and len(batch.token_ids) == len(chunks)
        self._batch = batch if can_follow else None
        return batch

    def _following(self, last: Batch) -> Batch:
        """Return the batch after another one, if no sequence needs another block."""
        return Batch(
            token_ids=self._chosen,
            positions=last.positions + _ONE,
            cu_seqlens_q=last.cu_seqlens_q,
            seq_lens=last.seq_lens + _ONE,
            block_tables=last.block_tables,
            slot_mapping=last.slot_mapping + _ONE,
            logit_rows=last.logit_rows,
        )

    def _find_slots(self, batch: Batch, chunks: Sequence[Chunk], block_size: int) -> None:
        """Look up the blocks of a batch anew."""
        tables = block_tables(chunks)
        index, offsets = np.divmod(batch.positions, np.int32(block_size))
        slots = tables[np.arange(len(index)), index] * np.int32(block_size) + offsets
        batch.block_tables, batch.slot_mapping = tables, slots
        self._num_steps_left = block_size - int(offsets.max())

    def newcomers(self) -> list[Sample]:
        """Return the samples that get their first token in this step."""
        return [sample for sample, _ in self._newcomers]

    def prepare(self) -> None:
        """Begin to compute, in another thread, what the tokens need besides logits."""
        for sampler in self._with_grammar:
            sampler.prepare()

    def note(self, started: float, now: float) -> None:
        """Note a step from `started` to `now` in the requests' clocks."""
        for sample in self.samples:
            sample.num_steps += 1
        for sample, start in self._newcomers:
            sample.request.clock.note(start, started, now, has_token=True)

    def address(
        self,
        outputs: list[Output],
        plain: list[Output],
        letters: deque[tuple[deque[Output], Output]],
    ) -> None:
        """Sort outputs, one per sample, into those without an inbox and those with one."""
        if not self._has_inboxes:
            plain += outputs
            return
        for inbox, output in zip(self._inboxes, outputs, strict=True):
            if inbox is None:
                plain.append(output)
            else:
                letters.append((inbox, output))

    def accept(self, chosen: Chosen, now: float) -> tuple[list[Output], list[Sample]]:
        """Append a token to each sample.

        Args:
            chosen: a token for each of them, and no failure.
            now: when they were chosen.

        Returns:
            An output per sample, and the samples that have ended.

        Raises:
            Exception: of a grammar or the tokenizer; the caller has all samples go back.
        """
        tokens, samples = chosen.token_ids, self.samples
        self._chosen = chosen.array
        deque(map(array.append, self._token_ids, tokens), maxlen=0)
        for i in self._with_memory:
            samples[i].sampler.record(tokens[i])
        outputs = [
            Output(
                name, index, [token_id], "", None, None, False, None, None, None,
                (
                    clock,
                    now,
                    sample.last_token,
                    stop - before,
                    sample.num_steps,
                    sample.sequence.num_preemptions,
                ),
            )
            for (name, index, before, clock, sample), token_id, stop in zip(
                self._labels, tokens, self.stops, strict=True
            )
        ]  # fmt: skip
        for i, logprobs in chosen.logprobs.items():
            outputs[i].logprobs = [logprobs]
        for sample, _ in self._newcomers:
            outputs[samples.index(sample)].prompt_logprobs = sample.request.prompt_logprobs
        return outputs, self._read(tokens, outputs)

    def _read(self, tokens: list[int], outputs: list[Output]) -> list[Sample]:
        """Fill in texts and ends, where there can be any; return the samples that have ended."""
        is_at_end = any(map(ge, self.stops, self._last_stops))
        if not is_at_end and self._end_ids.isdisjoint(tokens):
            if not self._with_text:
                return []
            if self._with_text_alone:
                for text_of, token_id, output in zip(self._text_of, tokens, outputs, strict=True):
                    output.text = text_of(token_id)
                return []
        return [
            sample
            for sample, token_id, output in zip(self.samples, tokens, outputs, strict=True)
            if sample.read(token_id, output)
        ]
