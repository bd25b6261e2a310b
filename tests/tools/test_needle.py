"""Key retrieval: where keys stand, what is asked, how answers are judged."""

import pytest
from helpers.evaluation_problems import Answer
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.needle import evaluate_needle, read_blocks


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("evaluation") / "model")
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=2000) as model:
        yield model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Forty functions and a file that does not parse."""
    folder = tmp_path_factory.mktemp("sources")
    functions = [
        f"@cache\ndef f{i}(first, second):\n    return {'first + ' * (i % 7)}second\n\n\n"
        for i in range(40)
    ]
    (folder / "a.py").write_text("import os\n\n\n" + "".join(functions))
    (folder / "b.py").write_text("def broken(:\n")
    return sorted(folder.glob("*.py"))


def test_blocks_are_whole_functions(sources):
    blocks = read_blocks(sources)
    assert len(blocks) == 40
    assert blocks[3].startswith("@cache\ndef f3(")
    compile("\n\n".join(["cache = lambda f: f", *blocks]), "blocks", "exec")


@pytest.mark.parametrize("length", [400, 700])
def test_keys_stand_where_they_should(llm, sources, length):
    depths = (0.0, 0.5, 1.0)
    result = evaluate_needle(
        llm, lengths=[length], depths=depths, trials=2, seed=4, sources=sources
    )
    assert result == evaluate_needle(
        llm, lengths=[length], depths=depths, trials=2, seed=4, sources=sources
    )
    assert len(result["samples"]) == 6
    for sample in result["samples"]:
        assert 0.75 * length < sample["tokens"] <= length
        assert 10_000 <= sample["expected"] < 100_000
    places = [sample["tokens_before"] for sample in result["samples"][::2]]
    assert places[0] == 0
    assert abs(places[1] - places[2] / 2) < 60
    values = {sample["expected"] for sample in result["samples"]}
    assert len(values) == 2


def test_the_prompt_asks_for_the_key(llm, sources, monkeypatch):
    def knowing(llm, requests, progress):
        answers = []
        for ids, params in requests:
            text = llm.tokenizer.decode(ids)
            compile(text + " 1", "prompt", "exec")  # it is Python
            name = text.rpartition("assert ")[2].partition("(")[0]
            function = text.partition(f"def {name}()")[2]
            answers.append([Answer(function.partition("return ")[2].split()[0])])
            assert params.is_greedy
        answers[-1] = [Answer(answers[-1][0].text + "7")]
        return answers

    monkeypatch.setattr("codellama_rt.tools.evaluation.needle.complete", knowing)
    result = evaluate_needle(llm, lengths=[300, 500], depths=[0.0, 1.0], sources=sources)
    assert [sample["found"] for sample in result["samples"]] == [True, True, True, False]
    assert result["scores"] == {"found": 0.75}
    assert [cell["found"] for cell in result["grid"]] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lengths": [100]}, "a length is from 256"), ({"lengths": [1990]}, "a length is from 256"),
     ({"depths": [1.1]}, "depths are from 0 to 1"), ({"sources": []}, None)],
)  # fmt: skip
def test_retrieval_that_cannot_be(llm, sources, options, words, tmp_path):
    given = {"lengths": [300], "depths": [0.5], "sources": sources} | options
    if words is None:
        (tmp_path / "few.py").write_text("def f():\n    pass\n")
        given["sources"], words = [tmp_path / "few.py"], "too few for a prompt of"
    with pytest.raises(ValueError, match=words):
        evaluate_needle(llm, **given)
