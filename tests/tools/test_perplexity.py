"""Perplexity of files against plain logits: whole, by sliding windows, and what cannot be."""

import math

import numpy as np
import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.llm.llm import LLM
from codellama_rt.tools.evaluation.perplexity import _windows, evaluate_perplexity


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("evaluation") / "model")
    with LLM(folder, kv_memory=KV_MEMORY, max_model_len=2000) as model:
        yield model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    texts = {"a.py": "def add(first, second):\n    return first + second\n" * 24, "b.py": "é"}
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in texts]


def losses(llm, ids):
    logits = llm.logits(ids).astype(np.float64)[:-1]
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_probs[np.arange(len(ids) - 1), ids[1:]]


def test_perplexity_of_whole_files(llm, files):
    result = evaluate_perplexity(llm, files)
    expected = [losses(llm, llm.tokenizer.encode(path.read_text("utf-8"))) for path in files]
    assert [sample["tokens"] for sample in result["samples"]] == [len(each) for each in expected]
    for sample, each in zip(result["samples"], expected, strict=True):
        assert math.isclose(sample["perplexity"], math.exp(each.mean()), rel_tol=1e-9)
    together = np.concatenate(expected)
    assert math.isclose(result["scores"]["perplexity"], math.exp(together.mean()), rel_tol=1e-9)
    short, long = result["curve"]
    assert (short["tokens_before"], long["tokens_before"]) == (256, 512)
    assert short["tokens"] + long["tokens"] == len(together)


@pytest.mark.parametrize(("context", "stride"), [(64, 1), (64, 63), (100, 50), (390, 9)])
def test_perplexity_by_a_sliding_window(llm, files, context, stride):
    calls = []
    result = evaluate_perplexity(
        llm, files[:1], context=context, stride=stride, progress=lambda *call: calls.append(call)
    )
    ids = llm.tokenizer.encode(files[0].read_text("utf-8"))
    expected, first, end = [], 1, min(context, len(ids))
    expected += losses(llm, ids[:end]).tolist()
    while end < len(ids):
        first, end = end, min(end + stride, len(ids))
        window = [llm.tokenizer.bos_id, *ids[end - context + 1 : end]]
        expected += losses(llm, window)[first - end :].tolist()
    assert len(expected) == len(ids) - 1 == result["settings"]["tokens"]
    mean = math.exp(np.mean(expected))
    assert math.isclose(result["scores"]["perplexity"], mean, rel_tol=1e-9)
    assert calls[-1][0] == calls[-1][1]


def test_windows_score_every_token_once():
    for count in range(2, 40):
        for longest in range(2, 20):
            for stride in range(1, longest):
                windows = list(_windows(count, longest, stride))
                scored = [i for _, first, end in windows for i in range(first, end)]
                assert scored == list(range(1, count))
                assert all(0 <= begin < first and end - begin <= longest
                           for begin, first, end in windows)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [({"context": 1}, "context must be from 2"), ({"context": 2001}, "context must be from 2"),
     ({"context": 10, "stride": 10}, "stride must be from 1 to context - 1 = 9"),
     ({"stride": 0}, "stride must be")],
)  # fmt: skip
def test_windows_that_cannot_be(llm, files, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_perplexity(llm, files, **options)


def test_texts_that_cannot_be_scored(llm, tmp_path):
    path = tmp_path / "text"
    for content, words in [(b"", "no token to score"), (b"\xff", "not UTF-8"),
                           (b"xyz " * 2000, "more than max_model_len=2000")]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            evaluate_perplexity(llm, [path])
