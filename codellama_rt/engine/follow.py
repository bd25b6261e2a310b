"""Requests of an engine that one caller follows to their end, several at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.request import Output
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.completion import Job


class Jobs:
    """What is under way; each step of the engine brings all of it on."""

    def __init__(self, engine: Engine) -> None:
        """Start with nothing under way."""
        self._engine = engine
        self._inbox: dict[str, deque[Output]] = {}
        self._names = (f"llm-{i}" for i in itertools.count())

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Job:
        """Queue a request; options as `Engine.add_request` takes them.

        Raises:
            ValueError, TypeError: as there.
        """
        name = next(self._names)
        self._engine.add_request(name, prompt, params, **options)
        self._inbox[name] = deque()
        return Job(name, [int(token_id) for token_id in prompt], params.n)

    def finish(self, jobs: Sequence[Job]) -> None:
        """Run jobs to their ends."""
        while any(job.unfinished for job in jobs):
            self._step()
            for job in jobs:
                job.take(self._inbox[job.name])

    def stream(self, job: Job) -> Iterator[str]:
        """The job's text as it comes; it ends with the iterator, however that is dropped."""
        pieces = self._stream(job)
        next(pieces)  # begun: now its `finally` will be reached
        return pieces

    def dismiss(self, job: Job) -> None:
        """Forget a job, and abort what is left of it."""
        self._engine.abort(job.name)
        self._inbox.pop(job.name, None)

    def _step(self) -> None:
        """One step of the engine; its outputs go to whoever asked for them."""
        for output in self._engine.step():
            if output.request_id in self._inbox:
                self._inbox[output.request_id].append(output)

    def _stream(self, job: Job) -> Iterator[str]:
        try:
            yield ""
            while job.unfinished:
                self._step()
                inbox = self._inbox[job.name]
                text = "".join(output.text for output in inbox)
                job.take(inbox)
                if text:
                    yield text
        finally:
            self.dismiss(job)
