"""Requests of an engine that one caller follows to their end, several at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from codellama_rt.engine.completion import Job
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.request import Output
from codellama_rt.engine.sampling_params import SamplingParams


class Jobs:
    """What is under way; each step of the engine brings all of it on.

    Example:
        >>> jobs = Jobs(llm.engine)  # doctest: +SKIP
        >>> job = jobs.submit([1, 15043], SamplingParams())  # doctest: +SKIP
        >>> for outputs in jobs.follow([job]):  # doctest: +SKIP
        ...     print("".join(output.text for output in outputs), end="")
    """

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

    def follow(self, jobs: Sequence[Job]) -> Iterator[list[Output]]:
        """Run jobs to their ends, a step of the engine each time the iterator is asked.

        Yields:
            What the jobs gained in the step, already added to their completions; possibly nothing.
        """
        while any(job.unfinished for job in jobs):
            for output in self._engine.step():
                if output.request_id in self._inbox:
                    self._inbox[output.request_id].append(output)
            gained = [output for job in jobs for output in self._inbox[job.name]]
            for job in jobs:
                job.take(self._inbox[job.name])
            yield gained

    def finish(self, jobs: Sequence[Job]) -> None:
        """Run jobs to their ends at once."""
        for _ in self.follow(jobs):
            pass

    def stream(self, job: Job) -> Iterator[str]:
        """Return the job's text as it comes; the job ends with the iterator, however dropped."""
        pieces = self._stream(job)
        next(pieces)  # begun: now its `finally` will be reached
        return pieces

    def dismiss(self, job: Job) -> None:
        """Forget a job, and abort what is left of it."""
        self._engine.abort(job.name)
        self._inbox.pop(job.name, None)

    def _stream(self, job: Job) -> Iterator[str]:
        try:
            yield ""
            for outputs in self.follow([job]):
                if text := "".join(output.text for output in outputs):
                    yield text
        finally:
            self.dismiss(job)
