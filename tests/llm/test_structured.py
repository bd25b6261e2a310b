"""Structured outputs of a model with its tokenizer, and on the command line."""

import json
import re

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt import SamplingParams, StructuredOutputs

MESSAGES = [{"role": "user", "content": "A number?"}]
NUMBERS = StructuredOutputs(regex="[1-9][0-9]{0,3}(, [1-9][0-9]{0,3}){2}")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with clrt.LLM(make_folder(tmp_path_factory.mktemp("model") / "m"), kv_memory=KV_MEMORY) as llm:
        yield llm


def params(wanted, **options):
    return SamplingParams(
        **{"max_tokens": 100, "temperature": 1.0, "seed": 4, "structured_outputs": wanted} | options
    )


@pytest.mark.parametrize("prompt", ["", "def f(", [1], "名前 🙂"])
def test_completions_have_the_form(llm, prompt):
    for completion in llm.generate([prompt], params(NUMBERS, n=4)):
        assert re.fullmatch(NUMBERS.regex, completion.text)
        assert completion.finish_reason == "stop"
    streamed = "".join(llm.stream(prompt, params(NUMBERS)))
    assert streamed == llm.generate([prompt], params(NUMBERS))[0].text


def test_fillings_and_answers_have_the_form(llm):
    filled = llm.infill("x = [", "]\n", params(NUMBERS))
    assert re.fullmatch(NUMBERS.regex, filled.text)
    assert filled.stop_reason in llm.engine.admission.eos_token_ids or (
        filled.stop_reason == llm.tokenizer.eot_id
    )
    answer = llm.chat(MESSAGES, params(NUMBERS), chat_template="code-llama")
    assert re.fullmatch(NUMBERS.regex, answer.text)


def test_the_text_has_the_form_with_and_without_special_tokens(llm):
    for skips in (True, False):
        for seed in range(5):
            wanted = params(NUMBERS, seed=seed, skip_special_tokens=skips)
            assert re.fullmatch(NUMBERS.regex, llm.generate([[1]], wanted)[0].text)


def test_requests_with_and_without_a_form_run_together(llm):
    free = SamplingParams(max_tokens=20, seed=5, temperature=1.0)
    alone = [llm.generate("def f(", one)[0].token_ids for one in (free, params(NUMBERS))]
    both = llm.generate(["def f("] * 2, [free, params(NUMBERS)])
    assert [completion.token_ids for completion in both] == alone


def test_an_invalid_form_is_refused_before_anything_is_computed(llm):
    steps = llm.engine.stats()["steps"]
    with pytest.raises(ValueError, match="structured_outputs: json cannot be used: Invalid type"):
        llm.generate(["a", "b"], [None, params(StructuredOutputs(json={"type": "x"}))])
    assert llm.engine.stats()["steps"] == steps
    assert not llm.engine.has_unfinished()


def test_processors_of_a_model_apply_to_every_request(tmp_path):
    def only_e(token_ids, logits):
        logits[llm.tokenizer.encode_continuation("e")] = 100.0
        return logits

    folder = make_folder(tmp_path / "m")
    with clrt.LLM(folder, kv_memory=KV_MEMORY, logits_processors=[only_e]) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=3))[0].text == "eee"
        assert llm.infill("a", "b", SamplingParams(max_tokens=2)).text == "ee"
    with pytest.raises(TypeError, match="logits_processors must be a list of callables"):
        clrt.LLM(folder, logits_processors=only_e)


def test_a_value_of_a_schema(llm):
    schema = {"type": "object", "properties": {"größe": {"enum": ["名前", "🙂", " x"]}},
              "required": ["größe"], "additionalProperties": False}  # fmt: skip
    for seed in range(5):
        text = llm.generate("", params(StructuredOutputs(json=schema), seed=seed))[0].text
        assert json.loads(text)["größe"] in ("名前", "🙂", " x")
