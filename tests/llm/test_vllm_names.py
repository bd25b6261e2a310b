"""What users of vLLM write: its names of arguments, its prompts and its restrictions of tokens."""

import numpy as np
import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt.llm.llm import LLM

PROMPT = "def add(first, second):"
SHORT = clrt.SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM(make_folder(tmp_path_factory.mktemp("llm") / "model"), kv_memory=KV_MEMORY) as model:
        yield model
        stats = model.engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"]


def params(**options):
    return clrt.SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **options})


def test_prompts_that_are_dictionaries(llm):
    [expected] = llm.generate(PROMPT, SHORT)
    ids = llm.tokenizer.encode(PROMPT)
    for prompt in ({"prompt": PROMPT}, {"prompt_token_ids": ids},
                   {"prompt_token_ids": np.array(ids)}):  # fmt: skip
        assert llm.generate(prompt, SHORT)[0].token_ids == expected.token_ids
        assert llm.generate([PROMPT, prompt], SHORT)[1].token_ids == expected.token_ids
        assert "".join(llm.stream(prompt, SHORT)) == expected.text
        assert clrt.generate(llm, prompt, max_new_tokens=8) == clrt.generate(
            llm, PROMPT, max_new_tokens=8
        )


def test_another_name_of_params(llm):
    assert (
        llm.generate(PROMPT, sampling_params=SHORT)[0].text == llm.generate(PROMPT, SHORT)[0].text
    )
    each = [SHORT, params(max_tokens=3)]
    found = llm.generate([PROMPT, PROMPT], sampling_params=each)
    assert [len(one.token_ids) for one in found] == [8, 3]
    messages = [{"role": "user", "content": "Hello"}]
    answer = llm.chat(messages, sampling_params=SHORT)
    assert answer.token_ids == llm.chat(messages, SHORT).token_ids
    with pytest.raises(TypeError, match="two names of one argument"):
        llm.generate(PROMPT, SHORT, sampling_params=SHORT)
    with pytest.raises(TypeError, match="two names of one argument"):
        llm.chat(messages, SHORT, sampling_params=SHORT)
    with pytest.raises(TypeError, match="params must be SamplingParams, got dict"):
        llm.generate(PROMPT, sampling_params={"n": 1})


@pytest.mark.parametrize("word", ["add", " add", "add(first"])
def test_a_bad_word_never_comes_with_or_without_a_space(llm, word):
    """The model is led to write the word; without the restriction it does."""
    for lead in ("", " "):
        wanted = llm.tokenizer.encode_continuation(lead + word.strip())

        def leading(token_ids, logits, wanted=wanted):
            logits[wanted[len(token_ids)] if len(token_ids) < len(wanted) else 5] = 100.0
            return logits

        options = {"max_tokens": len(wanted), "logits_processors": [leading]}
        assert llm.generate(PROMPT, params(**options))[0].token_ids == wanted
        [found] = llm.generate(PROMPT, params(**options, bad_words=[word]))
        assert found.token_ids[:-1] == wanted[:-1]
        assert found.token_ids[-1] != wanted[-1]


def test_control_tokens_in_the_text(llm):
    """The text is what decoding all tokens with their names gives."""
    tokenizer = llm.tokenizer
    written = [tokenizer.piece_id("▁def"), tokenizer.eot_id, 2, tokenizer.piece_id("▁def")]

    def writing(token_ids, logits):
        logits[written[len(token_ids)]] = 100.0
        return logits

    options = {"max_tokens": 4, "logits_processors": [writing]}
    shown = llm.generate(PROMPT, params(**options, skip_special_tokens=False))[0].text
    assert shown == f" def{tokenizer.piece(tokenizer.eot_id)}</s> def"
    assert llm.generate(PROMPT, params(**options))[0].text == " def def"
    whole = params(**options, skip_special_tokens=False, stop=["def▁<E"])
    assert llm.generate(PROMPT, whole)[0].text == " "


@pytest.mark.parametrize("prompt_len", [1, 4])
def test_shown_control_tokens_are_those_of_decoding(llm, prompt_len):
    tokenizer, random = llm.tokenizer, np.random.default_rng(3)
    for _ in range(300):
        ids = [1, *random.integers(0, tokenizer.vocab_size, 12).tolist()]
        detokenizer = tokenizer.detokenizer(ids[:prompt_len], skip_special_tokens=False)
        text = "".join(map(detokenizer.push, ids[prompt_len:])) + detokenizer.flush()
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        before = tokenizer.decode(ids[:prompt_len], skip_special_tokens=False)
        assert whole.endswith(text)
        if "\ufffd" not in before:  # a prompt may end inside a character
            assert before + text == whole


def test_the_result_does_not_depend_on_the_batch(llm):
    def no_repeats(token_ids, logits):
        logits[token_ids] = -np.inf
        return logits

    many = [
        params(logits_processors=[no_repeats], temperature=1.0, seed=1),
        params(bad_words=["add", "def"], temperature=1.0, seed=2),
        params(allowed_token_ids=range(100, 300), n=2, temperature=1.0, seed=3),
        params(include_stop_str_in_output=True, stop=["e"], temperature=1.0, seed=4),
    ]
    together = llm.generate([PROMPT] * 4, many)
    alone = [one for each in many for one in llm.generate(PROMPT, each)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


def test_a_processor_that_raises_raises_from_the_call(llm):
    def failing(token_ids, logits):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        llm.generate([PROMPT, PROMPT], [SHORT, params(logits_processors=[failing])])
    with pytest.raises(LookupError, match="mine"):
        list(llm.stream(PROMPT, params(logits_processors=[failing])))
