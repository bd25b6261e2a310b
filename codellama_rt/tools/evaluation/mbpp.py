"""MBPP (arXiv:2108.07732): functions from a sentence and three tests, after three examples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.completing import Progress
from codellama_rt.tools.evaluation.solving import Task, solve

STOP = ("[DONE]",)
EXAMPLES = (2, 3, 4)  # the problems before each prompt, as in the paper
TEST_SPLIT = range(11, 511)  # the problems that are evaluated


@dataclass(frozen=True)
class Problem:
    """One problem; the fields have the names of the published file."""

    task_id: int
    text: str
    code: str
    test_list: tuple[str, ...]
    test_setup_code: str = ""
    test_imports: tuple[str, ...] = ()


def read_problems(path: Path) -> list[Problem]:
    """Read the published file, mbpp.jsonl, or its revised part, sanitized-mbpp.json.

    Returns:
        The problems of the file, in its order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed, naming line and field, or lacks the examples or every problem
            of the test split.
    """
    problems: dict[int, Problem] = {}
    for place, record in _records(path):
        problem = _problem(place, record)
        if problem.task_id in problems:
            raise ValueError(f"{place}: task_id {problem.task_id} occurs twice")
        problems[problem.task_id] = problem
    missing = [number for number in EXAMPLES if number not in problems]
    if missing:
        raise ValueError(f"{path}: the problems {EXAMPLES} are the examples, {missing} are missing")
    if not any(number in TEST_SPLIT for number in problems):
        raise ValueError(f"{path}: no task_id is in the test split, from 11 to 510")
    return list(problems.values())


def _records(path: Path) -> list[tuple[str, Any]]:
    """Return the JSON values of the file, each with a description of where it is."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if text.lstrip().startswith("["):
        array = _parsed(str(path), text)
        return [(f"{path}, item {i}", record) for i, record in enumerate(array, start=1)]
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1)]
    return [(place, _parsed(place, line)) for place, line in lines if line.strip()]


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # also of a number with too many digits
        raise ValueError(f"{place} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{place} is not JSON that can be read: nested too deeply") from None


def _problem(place: str, record: Any) -> Problem:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a problem is an object, got {type(record).__name__}")
    text = "prompt" if "prompt" in record else "text"  # of the revised part
    for name in ("task_id", text, "code", "test_list"):
        if name not in record:
            raise ValueError(f"{place}: the field {name} is missing")
    if type(record["task_id"]) is not int:
        raise ValueError(f"{place}: task_id must be an integer, got {record['task_id']!r:.80}")
    setup, imports = record.get("test_setup_code", ""), record.get("test_imports", [])
    for name, value in ((text, record[text]), ("code", record["code"]), ("test_setup_code", setup)):
        if not _is_text(value):
            raise ValueError(f"{place}: {name} must be a text, got {value!r:.80}")
    tests = record["test_list"]
    for name, value in (("test_list", tests), ("test_imports", imports)):
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise ValueError(f"{place}: {name} must be a list of texts, got {value!r:.80}")
    if not tests:
        raise ValueError(f"{place}: test_list is empty")
    return Problem(
        record["task_id"], record[text], record["code"], tuple(tests), setup, tuple(imports)
    )


def _is_text(value: Any) -> bool:
    """Return whether a value is a string without lone surrogates, which no tokenizer takes."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def evaluate_mbpp(
    llm: LLM,
    problems: Sequence[Problem],
    *,
    params: SamplingParams | None = None,
    n: int = 1,
    ks: Sequence[int] = (1,),
    limit: int | None = None,
    execute: bool = False,
    timeout_s: float = 10.0,
    progress: Progress | None = None,
    execution_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the functions of the test split and, if requested, run their tests.

    Args:
        llm: the model.
        problems: from `read_problems`.
        params: how to sample; None: greedy, at most 512 tokens.
        n: samples per problem.
        ks: values of k for pass@k; none above n.
        limit: maximum number of problems.
        execute: run the model's code, with limits; otherwise there are no scores.
        timeout_s: limit per test.
        progress, execution_progress: called with samples done and total samples.

    Raises:
        ValueError: a k above n, or a prompt that does not fit.
    """
    by_number = {problem.task_id: problem for problem in problems}
    examples = "".join(
        f"{question(by_number[number])}{_lines(by_number[number].code)}\n[DONE]\n\n"
        for number in EXAMPLES
    )
    chosen = [problem for problem in problems if problem.task_id in TEST_SPLIT][:limit]
    return {"task": "mbpp"} | solve(
        llm,
        [
            Task(problem.task_id, examples + question(problem), partial(check_program, problem))
            for problem in chosen
        ],
        params=params,
        stop=STOP,
        n=n,
        ks=ks,
        execute=execute,
        timeout_s=timeout_s,
        progress=progress,
        execution_progress=execution_progress,
    )


def question(problem: Problem) -> str:
    """Return the prompt for one problem, up to where the code begins."""
    tests = "\n".join(map(_lines, problem.test_list))
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text.strip()} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def check_program(problem: Problem, completion: str) -> str:
    """Return a program that tests whether a completion is right."""
    # The setup may use what the code defines.
    parts = (completion, *problem.test_imports, problem.test_setup_code, *problem.test_list)
    return "\n".join(_lines(part) for part in parts) + "\n"


def _lines(code: str) -> str:
    """Return code with the line ends of this system; the file has both kinds."""
    return code.replace("\r\n", "\n").strip("\n")
