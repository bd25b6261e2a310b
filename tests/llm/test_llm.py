"""LLM: prompts of every kind, streams, infilling, failures, and nothing left behind."""

import gc

import numpy as np
import pytest
from helpers.goldens import make_engine, run, tiny_golden
from helpers.tiny_llm import KV_MEMORY, NAME, make_folder
from helpers.tolerances import LOGPROB_ATOL

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM

PROMPT = "def add(first, second):"
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After each test the shared engine has no request and all its blocks."""
    yield
    if "llm" in request.fixturenames:
        stats = request.getfixturevalue("llm").engine.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert stats["kv_blocks_free"] == stats["kv_blocks"]


def test_tokens_and_text_of_a_prompt(llm):
    (completion,) = llm.generate(PROMPT, SHORT)
    prompt_ids = llm.tokenizer.encode(PROMPT)
    engine = make_engine(tiny_golden(NAME).model(), kv_dtype="bfloat16")
    assert completion.prompt_token_ids == prompt_ids
    assert completion.token_ids == run(engine, [prompt_ids], SHORT)[0]
    whole = llm.tokenizer.decode(prompt_ids + completion.token_ids)
    assert llm.tokenizer.decode(prompt_ids) + completion.text == whole
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.index == 0


def test_stats(llm):
    stats = llm.generate(PROMPT, SHORT)[0].stats
    assert stats["prompt_tokens"] == len(llm.tokenizer.encode(PROMPT))
    assert stats["generated_tokens"] == 8
    assert 0 < stats["first_token_s"] <= stats["total_s"]


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.int64)])
def test_token_ids_of_every_kind(llm, kind):
    ids = llm.tokenizer.encode(PROMPT)
    expected = llm.generate(PROMPT, SHORT)[0].token_ids
    assert llm.generate(kind(ids), SHORT)[0].token_ids == expected
    assert llm.generate([kind(ids), PROMPT], SHORT)[0].token_ids == expected


def test_prompts_keep_their_order(llm):
    prompts = [PROMPT, [1, 40, 50], "class Stack:", PROMPT + "\n    return"]
    together = [completion.token_ids for completion in llm.generate(prompts, SHORT)]
    assert together == [llm.generate(prompt, SHORT)[0].token_ids for prompt in prompts]


def test_no_prompts(llm):
    assert llm.generate([]) == []


def test_samples_of_one_prompt(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    completions = llm.generate([PROMPT, "class"], params)
    assert [completion.index for completion in completions] == [0, 1, 2] * 2
    assert len({tuple(completion.token_ids) for completion in completions[:3]}) == 3
    again = llm.generate([PROMPT, "class"], params)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]


def test_params_for_each_prompt(llm):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 4)]
    completions = llm.generate([PROMPT, PROMPT], params)
    assert [len(completion.token_ids) for completion in completions] == [1, 4]


def test_logprobs_are_those_of_the_logits(llm):
    params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    (completion,) = llm.generate(PROMPT, params)
    ids = completion.prompt_token_ids + completion.token_ids
    logits = llm.logits(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    begin = len(completion.prompt_token_ids)
    for i, (token_id, entry) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        row = expected[begin + i - 1]
        assert entry[token_id].rank == 1
        for candidate, logprob in entry.items():
            assert abs(logprob.logprob - row[candidate]) < LOGPROB_ATOL
    assert completion.prompt_logprobs[0] is None
    for position, entry in enumerate(completion.prompt_logprobs[1:], start=1):
        expected_logprob = expected[position - 1, ids[position]]
        assert abs(entry[ids[position]].logprob - expected_logprob) < LOGPROB_ATOL


def test_logits_are_those_of_the_golden_model(llm):
    golden = tiny_golden(NAME)
    prompt = golden.cases[2]["prompt"]
    logits = llm.logits(prompt)
    assert logits.dtype == np.float32
    allowed = golden.cases[2]["native_dtype_max_abs_diff"]
    assert np.abs(logits - golden.arrays["logits_2"]).max() < allowed
    far = llm.logits(prompt, first_position=16384)
    assert np.abs(far - golden.arrays["logits_pos_16384"]).max() < allowed


def test_stop_string_is_cut_and_named(llm):
    whole = llm.generate(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))[0].text
    stop = whole.strip()[4:7]
    (completion,) = llm.generate(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True, stop=stop))
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_stream_is_the_text_in_pieces(llm):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    pieces = list(llm.stream(PROMPT, params))
    assert len(pieces) > 3
    assert "".join(pieces) == llm.generate(PROMPT, params)[0].text


def test_streams_that_take_turns(llm):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [PROMPT, "class Stack:"]
    streams = [llm.stream(prompt, params) for prompt in prompts]
    texts = ["", ""]
    for _ in range(13):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    between = llm.generate(PROMPT, params)
    assert texts == [c.text for c in llm.generate(prompts, params)]
    assert texts[0] == between[0].text
    assert [list(stream) for stream in streams] == [[], []]


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_stream_that_is_dropped_ends_its_request(llm, num_read):
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in range(num_read):
        next(stream)
    assert llm.engine.has_unfinished()
    del stream
    gc.collect()
    assert not llm.engine.has_unfinished()


def test_infilling(llm):
    tokenizer = llm.tokenizer
    params = SamplingParams(max_tokens=10)
    for suffix_first in (False, True):
        completion = llm.infill("def f(", "):", params, suffix_first=suffix_first)
        prompt = tokenizer.encode_infill("def f(", "):", suffix_first=suffix_first)
        assert completion.prompt_token_ids == prompt
        assert completion.text == tokenizer.decode_infill(completion.token_ids)
    filled = llm.generate("def f(<FILL_ME>):", params)[0]
    assert filled.token_ids == llm.infill("def f(", "):", params).token_ids


def test_infilling_ends_at_eot(llm):
    eot = llm.tokenizer.eot_id
    params = SamplingParams(max_tokens=10, logit_bias={eot: 100})
    for completion in (llm.infill("a", "b", params), llm.generate("a<FILL_ME>b", params)[0]):
        assert completion.token_ids == [eot]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", eot)
        assert completion.text == ""
    assert len(llm.generate("a", params)[0].token_ids) == 10  # there it is a token like any other


def test_special_tokens_in_a_text_stay_text(llm):
    (completion,) = llm.generate("</s><s>", SHORT)
    assert completion.prompt_token_ids[0] == llm.tokenizer.bos_id
    assert not {1, 2} & set(completion.prompt_token_ids[1:])


def test_failure_of_one_prompt_ends_the_others(llm):
    with pytest.raises(ValueError, match="at least one token"):
        llm.generate([PROMPT, []], SHORT)
    assert not llm.engine.has_unfinished()


def test_failure_while_computing_ends_the_others(llm, monkeypatch):
    def fail(batch, kv_cache):
        raise RuntimeError("out of order")

    monkeypatch.setattr(llm.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        llm.generate([PROMPT, "class"], SHORT)
    assert not llm.engine.has_unfinished()


def test_logits_that_are_no_numbers(llm, monkeypatch):
    forward = llm.model.forward
    monkeypatch.setattr(llm.model, "forward", lambda *a: forward(*a) * np.float32(np.nan))
    with pytest.raises(RuntimeError, match="no token to choose at position"):
        llm.generate(PROMPT, SHORT)
