"""Run many prompts through the engine together, with progress reports."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.completion import Completion, Job
from codellama_rt.llm.llm import LLM

Progress = Callable[[int, int], None]  # called with samples done and total samples


def complete(
    llm: LLM,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Complete all requests together.

    Args:
        llm: the model.
        requests: token ids and sampling parameters of each.
        progress: called as samples finish.

    Returns:
        The samples of each request.

    Raises:
        ValueError: a prompt that does not fit; no request is left unfinished.
    """
    jobs = {f"eval-{i}": Job(f"eval-{i}", list(r[0]), r[1].n) for i, r in enumerate(requests)}
    total = sum(job.unfinished for job in jobs.values())
    try:
        for name, (prompt, params) in zip(jobs, requests, strict=True):
            llm.engine.add_request(name, prompt, params)
        while any(job.unfinished for job in jobs.values()):
            for output in llm.engine.step():
                if output.request_id in jobs:
                    jobs[output.request_id].take(deque([output]))
            if progress is not None:
                progress(total - sum(job.unfinished for job in jobs.values()), total)
    finally:
        for name in jobs:
            llm.engine.abort(name)
    return [job.completions for job in jobs.values()]


def fingerprint(texts: Sequence[str]) -> str:
    """Return a hash of all texts: two runs have equal hashes only if all their texts are equal."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
