"""What samples gain by a step is theirs from one moment on, whatever is raised around it.

What is known of a request are its tokens, which of them are in the cache, and its outputs; they
change together. Until the moment when a gain is certain, `recover` takes all of it back; after it,
`recover` finishes handing it over. Everything else is computed anew from these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.lineup import Lineup
from codellama_rt.engine.metrics import EngineMetrics
from codellama_rt.engine.output import Output
from codellama_rt.engine.request import Request
from codellama_rt.engine.request_table import RequestTable
from codellama_rt.engine.sample import Sample
from codellama_rt.engine.sampler import Chosen
from codellama_rt.engine.sequence import Chunk
from codellama_rt.engine.speculation import Speculation


@dataclass(slots=True)
class _InFlight:
    """What samples are about to gain; all lists but the last are per sample.

    Attributes:
        samples: which they are.
        num_tokens: how many tokens each has, before.
        num_forks: how many samples its request has, before.
        num_computed: how many of its tokens are in the cache, after.
        outputs: of requests without an inbox.
        letters: the other outputs, each with its inbox.
        is_certain: an exception does not take it back any more.
    """

    samples: Sequence[Sample]
    num_tokens: Sequence[int]
    num_forks: Sequence[int]
    num_computed: Sequence[int] = ()
    outputs: list[Output] = field(default_factory=list)
    letters: deque[tuple[deque[Output], Output]] = field(default_factory=deque)
    is_certain: bool = False


class Delivery:
    """Give samples their tokens; for the engine's owner only."""

    def __init__(
        self,
        table: RequestTable,
        blocks: BlockManager,
        metrics: EngineMetrics,
        speculation: Speculation | None = None,
    ) -> None:
        """Take the engine's parts."""
        self._table, self._blocks, self._metrics = table, blocks, metrics
        self._speculation = speculation
        self._in_flight: _InFlight | None = None

    def recover(self) -> None:
        """Take back, or finish handing over, what an exception has interrupted."""
        if self._in_flight is not None:
            if self._in_flight.is_certain:
                self._hand_over()
            else:
                self._undo()
            self._in_flight = None

    def give_all(self, lineup: Lineup, chosen: Chosen, started: float, now: float) -> bool:
        """Give each sample of a lineup a token, of a step from `started` to `now`.

        Args:
            lineup: has chosen without failure.
            chosen: its tokens.
            started: when the step began.
            now: when the tokens were chosen.

        Returns:
            False if something was raised; all samples are as before then.
        """
        samples = lineup.samples
        lineup.note(started, now)
        flight = _InFlight(samples, lineup.stops, lineup.num_forks, lineup.stops)
        self._in_flight = flight
        try:
            outputs, ended = lineup.accept(chosen, now)
        except Exception:  # perhaps a passing one
            self._undo()
            self._in_flight = None
            return False
        lineup.address(outputs, flight.outputs, flight.letters)
        flight.is_certain = True
        self._hand_over()

        self._count_tokens(lineup, now)
        block_size = self._blocks.block_size
        with_full_block = [i for i, stop in enumerate(lineup.stops) if not stop % block_size]
        for sample in (*(samples[i] for i in with_full_block), *lineup.newcomers()):
            self._blocks.index_blocks(sample.sequence)
        for sample in ended:
            self._settle(sample.request, [sample])
        if ended:
            self._metrics.count_finished(outputs)
        return True

    def give(
        self,
        sample: Sample,
        chunk: Chunk,
        logits: np.ndarray | Exception,
        started: float,
        now: float,
        tries: int,
    ) -> int:
        """Give one sample its logits, or end it with an error.

        Args:
            sample: of the chunk's sequence.
            chunk: what was computed from `started` to `now`.
            logits: (chunk.num_logits, vocab_size) float32, or what the model raised.
            started: when the step began.
            now: when the logits were computed.
            tries: what is raised in the last of so many ends the sample.

        Returns:
            The number of new tokens.
        """
        request, sequence, num_samples = sample.request, chunk.sequence, len(sample.request.samples)
        flight = _InFlight([sample], [len(sequence.token_ids)], [num_samples])
        self._in_flight = flight
        sample.num_steps += 1
        result: Any = logits
        if not isinstance(result, Exception):
            result = self._gained(sample, chunk, logits, tries)
        if isinstance(result, Exception):
            gained, num_computed = request.fail(sample, result), sequence.num_computed
        else:
            gained, num_computed = result, chunk.stop
            if chunk.draft:
                num_computed = len(sequence.token_ids) - 1  # behind it is what was not accepted
        request.clock.note(chunk.start, started, now, has_token=bool(gained))
        last_tokens = [sample.last_token for output in gained if output.token_ids]
        request.measure(gained, now)
        if request.inbox is None:
            flight.outputs += gained
        else:
            flight.letters += [(request.inbox, output) for output in gained]
        flight.num_computed = [num_computed]
        flight.is_certain = True
        self._hand_over()

        self._metrics.count_tokens(now, last_tokens)
        self._metrics.count_finished(gained)
        self._blocks.index_blocks(sequence)
        forks = request.samples[num_samples:]
        self._table.add_forks(sample, forks)
        self._settle(request, [sample, *forks])
        return sum(len(output.token_ids) for output in gained)

    def _count_tokens(self, lineup: Lineup, now: float) -> None:
        samples = lineup.samples
        if lineup.last_token is None:
            self._metrics.count_tokens(now, [sample.last_token for sample in samples])
        else:  # the same for all
            self._metrics.inter_token_seconds.observe(now - lineup.last_token, len(samples))
        for sample in samples:
            sample.last_token = now
        lineup.last_token = now

    def _settle(self, request: Request, samples: Sequence[Sample]) -> None:
        """Drop samples that have ended; others may copy what they have written."""
        if self._speculation is not None:
            for sample in samples:
                if sample.is_finished:
                    self._speculation.remember(sample.sequence)
        self._table.settle(request, samples)

    def _gained(
        self, sample: Sample, chunk: Chunk, logits: np.ndarray, tries: int
    ) -> list[Output] | Exception:
        """Return what a request gains by its logits, or what was raised over them at last."""
        for _ in range(tries):
            try:
                return sample.request.take(sample, chunk, logits)
            except Exception as error:  # perhaps a passing one
                self._undo()
                raised = error
                logits = logits[: len(logits) - len(chunk.draft)]
                chunk.drop_draft()
        return raised

    def _hand_over(self) -> None:
        """Hand over what is certain. An exception may interrupt it: then this is called again."""
        flight, table = self._in_flight, self._table
        table.outputs += flight.outputs  # no call stands between these two lines
        flight.outputs = []
        letters = flight.letters
        while letters:
            inbox, output = letters[0]
            inbox += (output,)  # nor between these
            del letters[0]
        for sample, num_computed in zip(flight.samples, flight.num_computed, strict=True):
            sample.sequence.num_computed = num_computed
        self._in_flight = None

    def _undo(self) -> None:
        """Go back to before the samples in flight took their logits."""
        flight = self._in_flight
        for sample, num_tokens, num_forks in zip(
            flight.samples, flight.num_tokens, flight.num_forks, strict=True
        ):
            sample.request.undo(sample, num_tokens, num_forks)
