"""Requests of an engine that their callers follow to their ends, from any number of threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from codellama_rt.engine.completion import Job
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.output import Output
from codellama_rt.engine.sampling_params import SamplingParams


class Jobs:
    """Requests under way; each step of the engine, whoever makes it, brings all of them on.

    Example:
        >>> jobs = Jobs(llm.engine)  # doctest: +SKIP
        >>> job = jobs.submit([1, 15043], SamplingParams())  # doctest: +SKIP
        >>> for outputs in jobs.follow([job]):  # doctest: +SKIP
        ...     print("".join(output.text for output in outputs), end="")
    """

    def __init__(self, engine: Engine) -> None:
        """Start with nothing under way."""
        self._engine = engine
        self._numbers = itertools.count()

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Job:
        """Queue a request; options as `Engine.add_request` takes them.

        Raises:
            ValueError, TypeError: as there.
        """
        name, inbox = f"llm-{next(self._numbers)}", deque()
        self._engine.add_request(name, prompt, params, inbox=inbox, **options)
        return Job(name, [int(token_id) for token_id in prompt], params.n, inbox)

    def follow(self, jobs: Sequence[Job]) -> Iterator[list[Output]]:
        """Run jobs to their ends, a step of the engine each time the iterator is asked.

        Where another thread's step has brought something already, no step is made. A job that is
        aborted ends, and so do all when the engine is closed.

        Yields:
            What the jobs gained, already added to their completions; possibly nothing.
        """
        while unfinished := [job for job in jobs if job.unfinished]:
            self._engine.advance({job.name: job.inbox for job in unfinished})
            yield [output for job in unfinished for output in job.take()]

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
        """Abort what is left of a job; it may be called anywhere, and does not wait."""
        if job.unfinished:
            self._engine.discard(job.name)

    def _stream(self, job: Job) -> Iterator[str]:
        try:
            yield ""
            for outputs in self.follow([job]):
                if text := "".join(output.text for output in outputs):
                    yield text
        finally:
            self.dismiss(job)
