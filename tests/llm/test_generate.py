"""generate: one prompt or several, text or a stream of it, a model's name or an LLM."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt

PROMPT = "def add(first, second):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    with clrt.LLM(folder, kv_memory=KV_MEMORY) as model:
        yield model


@pytest.fixture(scope="module")
def expected(llm):
    return llm.generate(PROMPT, clrt.SamplingParams(max_tokens=9))[0].text


@pytest.fixture
def closed(monkeypatch):
    """The LLMs that were closed."""
    closed = []
    close = clrt.LLM.close
    monkeypatch.setattr(clrt.LLM, "close", lambda self: (closed.append(self), close(self)))
    return closed


def test_one_prompt_gives_a_str(llm, expected):
    assert clrt.generate(llm, PROMPT, max_new_tokens=9) == expected


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda prompts: (p for p in prompts)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_several_prompts_give_a_list(llm, expected, kind, count):
    prompts = kind([PROMPT] * count)
    assert clrt.generate(llm, prompts, max_new_tokens=9) == [expected] * count


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter])
def test_token_ids_are_one_prompt(llm, expected, kind):
    ids = llm.tokenizer.encode(PROMPT)
    assert clrt.generate(llm, kind(ids), max_new_tokens=9) == expected
    if kind is not iter:
        assert clrt.generate(llm, [kind(ids)], max_new_tokens=9) == [expected]
        assert clrt.generate(llm, [kind(ids), PROMPT], max_new_tokens=9) == [expected] * 2


def test_rows_of_an_array_are_prompts(llm, expected):
    ids = llm.tokenizer.encode(PROMPT)
    for rows in (1, 2):
        assert clrt.generate(llm, np.array([ids] * rows), max_new_tokens=9) == [expected] * rows


def test_model_by_path(folder, expected, closed):
    options = {"max_new_tokens": 9, "kv_memory": KV_MEMORY}
    assert clrt.generate(folder, PROMPT, **options) == expected
    assert clrt.generate(str(folder), PROMPT, **options) == expected
    assert len(closed) == 2


def test_model_that_fails_is_closed(folder, closed):
    with pytest.raises(ValueError, match="at least one token"):
        clrt.generate(folder, [[]], kv_memory=KV_MEMORY)
    assert len(closed) == 1


def test_given_llm_stays_open(llm, expected, closed):
    clrt.generate(llm, PROMPT, max_new_tokens=9)
    list(clrt.generate(llm, PROMPT, max_new_tokens=9, stream=True))
    assert not closed


def test_stream(llm, expected):
    pieces = clrt.generate(llm, PROMPT, max_new_tokens=9, stream=True)
    assert isinstance(pieces, Iterator)
    assert "".join(pieces) == expected


def test_stream_of_a_model_by_path_closes_it(folder, expected, closed):
    pieces = clrt.generate(folder, PROMPT, max_new_tokens=9, stream=True, kv_memory=KV_MEMORY)
    assert "".join(pieces) == expected
    assert len(closed) == 1
    pieces = clrt.generate(folder, PROMPT, max_new_tokens=9, stream=True, kv_memory=KV_MEMORY)
    next(pieces)
    pieces.close()
    assert len(closed) == 2


def test_dropped_stream_ends_its_request(llm):
    pieces = clrt.generate(llm, PROMPT, stream=True)
    assert llm.engine.has_unfinished()
    del pieces
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("prompts", [[], [PROMPT], [PROMPT, PROMPT]])
def test_stream_takes_one_prompt(llm, prompts):
    with pytest.raises(ValueError, match=f"stream=True takes one prompt, got .*{len(prompts)}"):
        clrt.generate(llm, prompts, stream=True)


def test_sampling_arguments_are_those_of_the_params(llm):
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 30, "seed": 3}
    stop = clrt.generate(llm, PROMPT, max_new_tokens=30, **options)[6:8]
    params = clrt.SamplingParams(max_tokens=30, stop=(stop, "never"), **options)
    text = clrt.generate(llm, PROMPT, max_new_tokens=30, stop=[stop, "never"], **options)
    assert text == llm.generate(PROMPT, params)[0].text
    assert stop not in text


def test_seed(llm):
    texts = [
        clrt.generate(llm, PROMPT, max_new_tokens=12, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_filling_alone_is_returned(llm):
    filling = clrt.generate(llm, "def f(<FILL_ME>):", max_new_tokens=9)
    assert filling == llm.infill("def f(", "):", clrt.SamplingParams(max_tokens=9)).text


def test_options_of_an_llm_that_is_made_already(llm):
    with pytest.raises(TypeError, match="an LLM is already made; it takes no dtype, kv_memory"):
        clrt.generate(llm, PROMPT, kv_memory="1GB", dtype="float32")


def test_unknown_option(folder):
    with pytest.raises(TypeError, match="max_tokens"):
        clrt.generate(folder, PROMPT, max_tokens=5)


def test_arguments_are_checked_before_the_model_is_opened():
    with pytest.raises(ValueError, match="temperature"):
        clrt.generate("no such model", PROMPT, temperature=-1)
    with pytest.raises(TypeError, match="prompts are a str"):
        clrt.generate("no such model", None)
