"""The unfinished requests of an engine: which they are, and where their outputs go."""

from __future__ import annotations

from collections.abc import Iterable

from codellama_rt.engine.output import Output
from codellama_rt.engine.request import Request
from codellama_rt.engine.sample import Sample
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Sequence


class RequestTable:
    """The unfinished requests, their samples, and the outputs that nobody has taken yet.

    Attributes:
        requests: by id.
        samples: unfinished and forked, by sequence; each is known to the scheduler.
        outputs: of requests without an inbox.
        num_arrived: requests added so far.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        """Start with no request; `scheduler` is told of those that come and go."""
        self.requests: dict[str, Request] = {}
        self.samples: dict[Sequence, Sample] = {}
        self.outputs: list[Output] = []
        self.num_arrived = 0
        self._scheduler = scheduler

    def add(self, request: Request) -> None:
        """Queue a request behind those of its priority."""
        sample = request.samples[0]
        sequence = sample.sequence
        sequence.order = sequence.order[0], self.num_arrived, 0
        self.num_arrived += 1
        self.requests[request.request_id] = request
        self.samples[sequence] = sample
        self._scheduler.add(sequence)

    def take_outputs(self) -> list[Output]:
        """Return the outputs so far and keep none."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def add_forks(self, sample: Sample, forks: Iterable[Sample]) -> None:
        """Queue the samples that have forked from one."""
        for fork in forks:
            self.samples[fork.sequence] = fork
            self._scheduler.add_fork(sample.sequence, fork.sequence)

    def settle(self, request: Request, samples: Iterable[Sample]) -> None:
        """Drop those of a request's samples that have ended, and it with the last of them."""
        for sample in samples:
            if sample.is_finished:
                self._forget(sample)
        if request.is_finished:
            self.requests.pop(request.request_id, None)  # another sample may have ended beside it

    def remove(self, request: Request) -> None:
        """Drop a request with all its samples."""
        del self.requests[request.request_id]
        for sample in request.samples:
            if sample.sequence in self.samples:
                self._forget(sample)

    def recover(self) -> None:
        """Drop what has ended, after an exception; the scheduler recovers by itself."""
        requests = {name: r for name, r in self.requests.items() if not r.is_finished}
        samples = [sample for request in requests.values() for sample in request.samples]
        self.requests = requests
        self.samples = {sample.sequence: sample for sample in samples if not sample.is_finished}

    def _forget(self, sample: Sample) -> None:
        self._scheduler.remove(sample.sequence)
        del self.samples[sample.sequence]
