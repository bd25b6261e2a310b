"""MBPP: what the file says, what the model is asked, how its answers are judged."""

import json

import pytest
from helpers.evaluation_problems import Answer
from helpers.mbpp_problems import PROBLEMS, problem, sanitized, write_mbpp
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation import mbpp
from codellama_rt.tools.evaluation.execution import PASSED, run_program
from codellama_rt.tools.evaluation.mbpp import check_program, evaluate_mbpp, read_problems

PROMPT = (
    "You are an expert Python programmer, and here is your task: "
    "Write a function to add 2 and a number. Your code should pass these tests:\n\n"
    "assert add_2(0) == 2\nassert add_2(1) == 3\nassert add_2(2) == 4\n"
    "[BEGIN]\ndef add_2(x):\n\treturn 2 + x \n[DONE]\n\n"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("mbpp") / "model")
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=2000) as model:
        yield model


@pytest.fixture
def problems(tmp_path):
    return read_problems(write_mbpp(tmp_path / "mbpp.jsonl"))


def test_both_files_are_read(tmp_path, problems):
    assert [one.task_id for one in problems] == [one["task_id"] for one in PROBLEMS]
    assert problems[1].text == "Write a function to add 2 and a number."
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps([sanitized(one) for one in PROBLEMS], indent=2))
    revised = read_problems(path)
    assert [one.text for one in revised] == [one.text for one in problems]
    assert revised[0].test_imports == ("import math",)


def test_own_solutions_pass_their_tests(problems):
    for one in problems:
        assert run_program(check_program(one, one.code)).result == PASSED
        assert run_program(check_program(one, "pass")).result != PASSED


def test_imports_and_setup_come_before_the_tests():
    its = mbpp.Problem(11, "", "", ("assert floor == 2", "assert f() == 1"),
                       "floor = math.floor(2.5)", ("import math",))  # fmt: skip
    assert run_program(check_program(its, "\ndef f():\r\n    return 1\n")).result == PASSED


def test_prompts_are_those_of_the_paper(llm, problems, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "codellama_rt.tools.evaluation.solving.complete",
        lambda llm, requests, progress: asked.extend(requests) or [[Answer("")]],
    )
    evaluate_mbpp(llm, problems, limit=1)
    [(ids, params)] = asked
    prompt = llm.tokenizer.decode(ids)
    assert prompt.startswith(PROMPT)
    assert prompt.count("[DONE]\n\n") == 3
    assert prompt.endswith("assert multiply_11(2) == 22\n[BEGIN]\n")
    assert params.stop == ("[DONE]",)
    assert (params.temperature, params.max_tokens) == (0.0, 512)


def test_answers_are_judged(llm, problems, monkeypatch):
    """Only those of the test split, 11 to 510."""
    right = [one.code for one in problems if one.task_id in range(11, 511)]
    given = iter([right[0], "def multiply_11(x): return 0", right[2], right[1], right[2], "\n"])

    def completions(llm, requests, progress=None):
        return [[Answer(next(given)) for _ in range(params.n)] for _, params in requests]

    monkeypatch.setattr("codellama_rt.tools.evaluation.solving.complete", completions)
    calls = []
    result = evaluate_mbpp(
        llm, problems, params=SamplingParams(temperature=1.0), n=2, ks=(1, 2), execute=True,
        execution_progress=lambda *counts: calls.append(counts),
    )  # fmt: skip
    assert result["task"] == "mbpp"
    assert result["scores"] == {"pass@1": 0.5, "pass@2": 1.0}
    assert [sample["task_id"] for sample in result["samples"]] == [11, 11, 12, 12, 510, 510]
    assert result["samples"][1]["reason"] == "AssertionError: "
    assert result["samples"][2]["reason"].startswith("NameError")
    assert calls[-1] == (6, 6)
    json.dumps(result)


def test_nothing_is_run_by_default(llm, problems, monkeypatch):
    monkeypatch.setattr("codellama_rt.tools.evaluation.solving.run_program", None)
    params = SamplingParams(max_tokens=4)
    first, second = (evaluate_mbpp(llm, problems, params=params) for _ in range(2))
    assert first == second
    assert first["scores"] == {}
    assert first["settings"]["problems"] == 3


def without(name):
    return {key: value for key, value in problem(7).items() if key != name}


MALFORMED = [
    ("{", "line 11 is not JSON"),
    ("[]", "line 11: a problem is an object, got list"),
    ("9" * 5000, "line 11 is not JSON"),
    ("[" * 10**5, "line 11 is not JSON"),
    (without("task_id"), "line 11: the field task_id is missing"),
    (without("text"), "line 11: the field text is missing"),
    (without("code"), "line 11: the field code is missing"),
    (without("test_list"), "line 11: the field test_list is missing"),
    (problem(7) | {"task_id": "7"}, "line 11: task_id must be an integer, got '7'"),
    (problem(7) | {"task_id": True}, "line 11: task_id must be an integer, got True"),
    (problem(7) | {"text": None}, "line 11: text must be a text, got None"),
    (problem(7) | {"code": "\ud800"}, "line 11: code must be a text"),
    (problem(7) | {"test_setup_code": 1}, "line 11: test_setup_code must be a text, got 1"),
    (problem(7) | {"test_list": "assert"}, "line 11: test_list must be a list of texts"),
    (problem(7) | {"test_list": [1]}, "line 11: test_list must be a list of texts"),
    (problem(7) | {"test_list": []}, "line 11: test_list is empty"),
    (problem(7) | {"test_imports": None}, "line 11: test_imports must be a list of texts"),
    (problem(2), "line 11: task_id 2 occurs twice"),
]


@pytest.mark.parametrize(("last", "words"), MALFORMED, ids=[words for _, words in MALFORMED])
def test_a_malformed_line_is_named(tmp_path, last, words):
    path = write_mbpp(tmp_path / "mbpp.jsonl")
    with path.open("a") as file:
        file.write(last if isinstance(last, str) else json.dumps(last))
    with pytest.raises(ValueError, match="^" + str(path)) as refused:
        read_problems(path)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_malformed_item_is_named(tmp_path):
    path = tmp_path / "sanitized-mbpp.json"
    its = sanitized(problem(7))
    del its["code"]
    path.write_text(json.dumps([sanitized(problem(2)), its]))
    with pytest.raises(ValueError, match="item 2: the field code is missing"):
        read_problems(path)
    path.write_text("[{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_problems(path)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((2, 3, 11), r"\[4\] are missing"),
        ((), r"\[2, 3, 4\] are missing"),
        ((2, 3, 4, 511), "test split, from 11 to 510"),
    ],
)
def test_a_file_without_what_is_needed(tmp_path, numbers, words):
    path = write_mbpp(tmp_path / "mbpp.jsonl", [problem(number) for number in numbers])
    with pytest.raises(ValueError, match=words):
        read_problems(path)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_problems(path)


@pytest.mark.parametrize("ks", [(), (0,), (2,)])
def test_k_is_at_most_n(llm, problems, ks):
    with pytest.raises(ValueError, match="k from 1 to n=1"):
        evaluate_mbpp(llm, problems, ks=ks)
