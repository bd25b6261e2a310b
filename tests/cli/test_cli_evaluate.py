"""`codellama-rt eval`: scores on stdout, results and pictures in files, mistakes in one line."""

import json

import pytest
from helpers.evaluation_problems import PROBLEMS
from helpers.mbpp_problems import write_mbpp
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.cli import main as cli
from codellama_rt.tools.evaluation import humaneval

OPTIONS = ("--kv-memory", KV_MEMORY, "--max-model-len", "1500")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("cli_eval") / "model"))


@pytest.fixture
def evaluate(capsys, monkeypatch, model):
    """Run `codellama-rt eval` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(humaneval, "read_problems", lambda: PROBLEMS)
    monkeypatch.setattr("codellama_rt.tools.evaluation.infilling.read_problems", lambda: PROBLEMS)

    def run(task, *args, folder=model):
        words = ["eval", task, folder, *OPTIONS, *map(str, args)]
        with pytest.raises(SystemExit) as ended:
            cli.app(words, prog_name="codellama-rt")
        return ended.value.code, *capsys.readouterr()

    return run


def test_humaneval(evaluate, tmp_path):
    file = tmp_path / "result.json"
    options = ("--max-new-tokens", 4, "--json", file)
    code, out, err = evaluate("humaneval", *options)
    assert (code, out) == (0, "")
    assert "--execute runs the tests" in err
    first = json.loads(file.read_text())
    assert (first["task"], first["model"], len(first["samples"])) == ("humaneval", "model", 3)
    code, out, _ = evaluate("humaneval", *options, "--execute", "--limit", 1, "--n", 2, "--k", 2)
    assert (code, out) == (0, "pass@2 = 0.0000\n")
    assert [s["completion"] for s in json.loads(file.read_text())["samples"]] == [
        first["samples"][0]["completion"]
    ] * 2


def test_mbpp(evaluate, tmp_path):
    problems, file = write_mbpp(tmp_path / "mbpp.jsonl"), tmp_path / "result.json"
    options = ("--problems", problems, "--max-new-tokens", 4, "--json", file)
    code, out, err = evaluate("mbpp", *options)
    assert (code, out) == (0, "")
    assert "--execute runs the tests" in err
    first = json.loads(file.read_text())
    assert (first["task"], first["model"], len(first["samples"])) == ("mbpp", "model", 3)
    code, out, _ = evaluate("mbpp", *options, "--execute", "--limit", 1, "--n", 2, "--k", 2)
    assert (code, out) == (0, "pass@2 = 0.0000\n")
    assert [s["completion"] for s in json.loads(file.read_text())["samples"]] == [
        first["samples"][0]["completion"]
    ] * 2


def test_a_malformed_file_is_refused_before_the_model_is_opened(evaluate, tmp_path):
    problems = write_mbpp(tmp_path / "mbpp.jsonl")
    problems.write_text(problems.read_text().replace('"test_list"', '"tests"', 1))
    code, out, err = evaluate("mbpp", "--problems", problems, folder="no-such-model")
    assert (code, out) == (2, "")
    assert f"{problems}, line 1: the field test_list is missing" in err
    assert err.count("\n") == 1


def test_infilling(evaluate, tmp_path):
    file = tmp_path / "result.json"
    code, out, err = evaluate("infilling", "--suffix-first", "--limit", 2, "--json", file)
    assert (code, out, err) == (0, "exact_match = 0.0000\n", "")
    assert json.loads(file.read_text())["settings"]["order"] == "SPM"


def test_perplexity(evaluate, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.py"
    text.write_text("def add(first, second):\n")
    picture = tmp_path / "plot.svg"
    code, out, err = evaluate("perplexity", "--file", text, "--context", 8, "--plot", picture)
    assert (code, err) == (0, "")
    assert out.startswith("perplexity = ")
    assert "<svg" in picture.read_text()


def test_needle(evaluate, tmp_path):
    source = tmp_path / "source.py"
    source.write_text("".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(40)))
    file = tmp_path / "result.json"
    code, out, err = evaluate(
        "needle", "--length", 300, "--depth", 0.5, "--trials", 2, "--source", source, "--json", file
    )
    assert (code, out, err) == (0, "found = 0.0000\n", "")
    assert len(json.loads(file.read_text())["samples"]) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("humaneval", "--temperature", -1), "temperature"),
        (("humaneval", "--k", 2), "k from 1 to n=1"),
        (("humaneval", "--json", "/no/such/folder/x"), "there is no directory /no/such/folder"),
        (("mbpp", "--problems", "no-such-file"), "no-such-file"),
        (("perplexity", "--file", "no-such-file"), "no-such-file"),
        (("needle", "--length", 5000), "a length is from 256"),
    ],
)
def test_a_mistake_is_told_in_one_line(evaluate, args, words):
    code, out, err = evaluate(*args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_model_that_cannot_infill(evaluate, tmp_path):
    plain = make_folder(tmp_path / "plain", infilling=False)
    code, _, err = evaluate("infilling", folder=str(plain))
    assert code == 2
    assert "cannot infill" in err
