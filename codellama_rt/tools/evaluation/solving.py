"""Solve programming tasks with a model and judge the solutions by tests, as HumanEval and MBPP do.

The score is pass@k (arXiv:2107.03374, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from codellama_rt.engine.sampling_params import MAX_SAMPLES, SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.completing import Progress, complete, fingerprint
from codellama_rt.tools.evaluation.execution import PASSED, Verdict, is_isolated, run_program


class Task(NamedTuple):
    """A program to write."""

    task_id: str | int
    prompt: str
    check: Callable[[str], str]  # returns the program that tests a completion of the prompt


def solve(
    llm: LLM,
    tasks: Sequence[Task],
    *,
    params: SamplingParams | None,
    stop: Sequence[str],
    n: int,
    ks: Sequence[int],
    execute: bool,
    timeout_s: float,
    progress: Progress | None,
    execution_progress: Progress | None,
) -> dict[str, Any]:
    """Complete the prompts n times each and, if requested, run the tests.

    Args:
        llm: the model.
        tasks: what to write.
        params: how to sample; None: greedy, at most 512 tokens.
        stop: strings that end a completion, besides those of params.
        n: samples per task.
        ks: values of k for pass@k; none above n.
        execute: run the model's code, with limits; otherwise there are no scores.
        timeout_s: limit per test.
        progress, execution_progress: called with samples done and total samples.

    Returns:
        The settings, scores, fingerprint and samples of a result.

    Raises:
        ValueError: a k above n.
    """
    if not ks or not 1 <= min(ks) <= max(ks) <= n:
        raise ValueError(f"pass@k takes k from 1 to n={n} samples, got {list(ks)}")
    params = SamplingParams(max_tokens=512) if params is None else params
    params = replace(params, stop=(*stop, *params.stop))
    requests = [request for task in tasks for request in _requests(llm, task, params, n)]
    completions = [one for group in complete(llm, requests, progress) for one in group]
    written = [task for task in tasks for _ in range(n)]
    samples = [
        {
            "task_id": task.task_id,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
        }
        for task, completion in zip(written, completions, strict=True)
    ]
    result = {
        "settings": {
            "n": n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "max_tokens": params.max_tokens,
            "problems": len(tasks),
        },
        "scores": {},
        "fingerprint": fingerprint([sample["completion"] for sample in samples]),
        "samples": samples,
    }
    if execute:
        programs = [
            task.check(sample["completion"]) for task, sample in zip(written, samples, strict=True)
        ]
        verdicts = judge(programs, timeout_s, execution_progress)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample |= {"result": verdict.result, "reason": verdict.reason}
        result["settings"] |= {"timeout_s": timeout_s, "network": not is_isolated()}
        result["scores"] = _scores([verdict.result == PASSED for verdict in verdicts], n, ks)
    return result


def _requests(
    llm: LLM, task: Task, params: SamplingParams, n: int
) -> list[tuple[list[int], SamplingParams]]:
    """Return requests for n samples of a task, as few as possible."""
    requests = []
    for first in range(0, n, MAX_SAMPLES):
        seed = None if params.seed is None else params.seed + first
        its = replace(params, n=min(MAX_SAMPLES, n - first), seed=seed)
        requests.append(llm.prompt_encoder.completion(task.prompt, its))
    return requests


def judge(programs: Sequence[str], timeout_s: float, progress: Progress | None) -> list[Verdict]:
    """Run programs one after another; `progress` is called with programs done and total."""
    verdicts: list[Verdict] = []
    for program in programs:
        verdicts.append(run_program(program, timeout_s=timeout_s))
        if progress is not None:
            progress(len(verdicts), len(programs))
    return verdicts


def _scores(passed: Sequence[bool], n: int, ks: Sequence[int]) -> dict[str, float]:
    """Return the mean pass@k of tasks with n samples each, in their order."""
    correct = [sum(passed[first : first + n]) for first in range(0, len(passed), n)]
    return {
        f"pass@{k}": sum(pass_at_k(n, c, k) for c in correct) / max(len(correct), 1) for k in ks
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate, without bias, the chance that one of k samples is right.

    `correct` of the n samples are right.

    Example:
        >>> pass_at_k(n=4, correct=1, k=2)
        0.5
    """
    if n - correct < k:
        return 1.0
    chance_of_none = 1.0
    for i in range(k):
        chance_of_none *= (n - correct - i) / (n - i)
    return 1.0 - chance_of_none
