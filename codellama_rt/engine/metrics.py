"""What is measured of requests and steps: times, counts and histograms, for whoever serves them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from codellama_rt.errors import CorruptLogitsError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
            60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0, 20000.0, 50000.0)  # fmt: skip
TOKEN_BUCKETS = tuple(2.0**i for i in range(18))  # to 131,072
_PREEMPTIONS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class RequestMetrics(NamedTuple):
    """The times of a request as of one output; seconds, of `time.perf_counter`.

    Attributes:
        arrival: when the request was added, on that clock.
        queue_seconds: until its first tokens were computed.
        prefill_seconds: from then on until the first output token of its first sample.
        first_token_seconds: from arrival to that token; None before it.
        token_seconds: from the sample's token before to this one, or to these, if a step gave
            several; None for the first, or none.
        total_seconds: from arrival to this output.
        prompt_tokens: of the request.
        cached_tokens: of these, how many the prefix cache had.
        output_tokens: of this sample so far.
        steps: in which tokens of this sample were computed.
        draft_tokens: that speculation has proposed for the request so far, for all its samples.
        accepted_tokens: of these, how many came besides the one token that each step gives.
        preemptions: how often this sample has lost its blocks, and was computed anew.
    """

    arrival: float
    queue_seconds: float
    prefill_seconds: float
    first_token_seconds: float | None
    token_seconds: float | None
    total_seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    steps: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int


@dataclass(slots=True)
class RequestClock:
    """When things happened to one request, and what was proposed for it; plain facts."""

    arrival: float
    prompt_tokens: int = 0
    first_step: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def note(self, start: int, started: float, now: float, *, has_token: bool) -> None:
        """Note a step from `started` to `now`, whose tokens of this request began at `start`."""
        if self.first_step is None:
            self.first_step, self.cached_tokens = started, start
        if has_token and self.first_token is None:
            self.first_token = now

    def metrics(
        self,
        now: float,
        last_token: float | None,
        output_tokens: int,
        steps: int,
        preemptions: int,
    ) -> RequestMetrics:
        """Return the times as of `now`.

        Args:
            now: when the output is made.
            last_token: when the sample had its token before; None: there is none, or none now.
            output_tokens: of the sample.
            steps: of the sample.
            preemptions: of the sample.
        """
        started = now if self.first_step is None else self.first_step
        prefilled = now if self.first_token is None else self.first_token
        return RequestMetrics(
            self.arrival,
            started - self.arrival,
            prefilled - started,
            None if self.first_token is None else self.first_token - self.arrival,
            None if last_token is None else now - last_token,
            now - self.arrival,
            self.prompt_tokens,
            self.cached_tokens,
            output_tokens,
            steps,
            self.draft_tokens,
            self.accepted_tokens,
            preemptions,
        )


# A clock, and the arguments of its `metrics`: one per token, so a plain tuple.
Measured = tuple[RequestClock, float, float | None, int, int, int]


class Output(Protocol):
    """What of `engine.Output` is counted."""

    finished: bool
    finish_reason: str | None
    error: Exception | None
    metrics: RequestMetrics


class Histogram:
    """Counts of values below fixed bounds, as Prometheus has them.

    Example:
        >>> histogram = Histogram((0.1, 1.0))
        >>> for value in (0.05, 0.5, 7.0):
        ...     histogram.observe(value)
        >>> histogram.snapshot()
        {'buckets': [(0.1, 1), (1.0, 2)], 'count': 3, 'sum': 7.55}
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start with no value.

        Args:
            bounds: ascending; a bucket counts the values up to its bound, and those below it.
        """
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, once or several times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += times * value

    def snapshot(self) -> dict[str, object]:
        """Return pairs (bound, values up to it), the number of all values, and their sum."""
        buckets, total = [], 0
        for bound, count in zip(self._bounds, self._counts[:-1], strict=True):
            total += count
            buckets.append((bound, total))
        return {"buckets": buckets, "count": total + self._counts[-1], "sum": self._sum}


@dataclass(slots=True)
class EngineMetrics:
    """Histograms of an engine since its start, and what else is counted of outputs and drafts."""

    step_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    prefill_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    inter_token_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    total_seconds: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    output_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    preemptions: Histogram = field(default_factory=lambda: Histogram(_PREEMPTIONS))
    finish_reasons: Counter[str] = field(default_factory=Counter)
    drafts: Counter[int] = field(default_factory=Counter)  # by how many of their tokens were right
    corrupt_outputs: int = 0

    def count_tokens(self, now: float, last_tokens: Collection[float | None]) -> None:
        """Count tokens chosen at `now`, by when their samples had the tokens before."""
        for before, times in Counter(last_tokens).items():
            if before is not None:
                self.inter_token_seconds.observe(now - before, times)

    def count_finished(self, outputs: Iterable[Output]) -> None:
        """Count those outputs that are their samples' last ones."""
        for output in outputs:
            if output.finished:
                self.finish_reasons[output.finish_reason] += 1
                self.corrupt_outputs += isinstance(output.error, CorruptLogitsError)
                self._count_finished(output.metrics)

    def _count_finished(self, times: RequestMetrics) -> None:
        self.total_seconds.observe(times.total_seconds)
        self.queue_seconds.observe(times.queue_seconds)
        self.prefill_seconds.observe(times.prefill_seconds)
        self.output_tokens.observe(times.output_tokens)
        self.prompt_tokens.observe(times.prompt_tokens)
        self.preemptions.observe(times.preemptions)
        if times.first_token_seconds is not None:
            self.first_token_seconds.observe(times.first_token_seconds)

    def snapshot(self) -> dict[str, object]:
        """Return the counts, and under "histograms" their snapshots, by name."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {
            "finish_reasons": dict(self.finish_reasons),
            "drafts": dict(self.drafts),
            "corrupt_outputs": self.corrupt_outputs,
            "histograms": {k: v.snapshot() for k, v in values.items() if isinstance(v, Histogram)},
        }


class StepRecord(NamedTuple):
    """One step, for `Engine(on_step=...)`.

    Attributes:
        started: when it began, seconds of `time.perf_counter`.
        schedule_seconds: choosing the tokens, and copying blocks.
        model_seconds: the forward pass.
        sample_seconds: choosing tokens, text and outputs.
        chunks: (request id, sample index, first position, position after the last) of each part.
        running: sequences that have blocks.
        waiting: sequences that wait for them.
    """

    started: float
    schedule_seconds: float
    model_seconds: float
    sample_seconds: float
    chunks: tuple[tuple[str, int, int, int], ...]
    running: int
    waiting: int
