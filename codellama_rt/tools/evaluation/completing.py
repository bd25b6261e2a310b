"""Many prompts through the engine at once, with a count of those that are done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from codellama_rt.engine.completion import Completion, Job
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM

Progress = Callable[[int, int], None]  # called with samples done and samples in all


def complete(
    llm: LLM, requests: Sequence[tuple[Sequence[int], SamplingParams]],
    progress: Progress | None = None,
) -> list[list[Completion]]:  # fmt: skip
    """Complete all requests together.

    Args:
        llm: the model.
        requests: token ids and parameters of each.
        progress: called as samples finish.

    Returns:
        For each request its samples.

    Raises:
        ValueError: a prompt that does not fit; nothing is left under way.
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
    """A hash of all texts: equal for two runs exactly if every one of them is."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
