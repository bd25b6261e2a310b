"""Run many prompts through the engine together, with progress reports."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from codellama_rt.engine.completion import Completion, Job
from codellama_rt.engine.sampling_params import SamplingParams
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
    jobs: list[Job] = []
    try:
        for prompt, params in requests:
            jobs.append(llm.jobs.submit(prompt, params))
        total = sum(job.unfinished for job in jobs)
        for _ in llm.jobs.follow(jobs):
            if progress is not None:
                progress(total - sum(job.unfinished for job in jobs), total)
    finally:
        for job in jobs:
            llm.jobs.dismiss(job)
    return [job.completions for job in jobs]


def fingerprint(texts: Sequence[str]) -> str:
    """Return a hash of all texts: two runs have equal hashes only if all their texts are equal."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
