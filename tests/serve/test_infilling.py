"""Gaps in every form that clients send: always Meta's ids, all of the text, and no more."""

import json

import pytest
from helpers.served import record_prompts, serving

from codellama_rt import LLM, SamplingParams

MARKS = ("<PRE>", "<SUF>", "<MID>")


@pytest.fixture(scope="module")
def code_llama(shared_dir):
    """A tiny model with Code Llama's vocabulary."""
    folder = shared_dir / "data" / "tiny" / "codellama_vocab_bf16_tok"
    with (
        LLM(folder, kv_memory="64MB", max_model_len=120_000, max_num_batched_tokens=4096) as llm,
        serving(llm, names=("codellama",)) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def cases(shared_dir):
    path = shared_dir / "data" / "golden" / "tok_infilling.json"
    return json.loads(path.read_text())["cases"]


@pytest.fixture
def computed(code_llama, monkeypatch):
    """The prompts that the engine gets."""
    return record_prompts(code_llama, monkeypatch)


def with_suffix(prefix, suffix, first):
    fields = {"prompt": prefix, "suffix": suffix, "suffix_first": first, "max_tokens": 0}
    return "/v1/completions", fields


def fim(prefix, suffix, first):
    fields = {"prompt": prefix, "suffix": suffix, "suffix_first": first, "max_tokens": 0}
    return "/v1/fim/completions", fields


def infill(prefix, suffix, first):
    fields = {"input_prefix": prefix, "input_suffix": suffix, "suffix_first": first}
    return "/infill", {**fields, "n_predict": 0, "response_fields": [""]}


def infill_in_parts(prefix, suffix, first):
    """llama.vim: the line with the cursor is `prompt`."""
    before, _, line = prefix.rpartition("\n")
    before += "\n" if "\n" in prefix else ""
    path, fields = infill(before, suffix, first)
    return path, {**fields, "prompt": line}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", [with_suffix, fim, infill, infill_in_parts])
def test_fields_give_metas_ids(code_llama, computed, cases, form, first):
    for case in cases:
        path, fields = form(case["prefix"], case["suffix"], first)
        answer = code_llama.ask("POST", path, fields)
        assert answer.status == 200, answer.body
    assert computed == [case["official_spm" if first else "official_psm"] for case in cases]


TEMPLATES = {
    "Continue, Tabby, Zed": "<PRE> {prefix} <SUF>{suffix} <MID>",
    "twinny": "<PRE>{prefix} <SUF> {suffix} <MID>",
    "SPM": "<PRE> <SUF>{suffix} <MID> {prefix}",
}
PATHS = {"/v1/completions": "max_tokens", "/completion": "n_predict"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_metas_ids(code_llama, computed, cases, name, path):
    column = "official_spm" if name == "SPM" else "official_psm"
    expected = []
    for case in cases:
        prefix, suffix = case["prefix"], case["suffix"]
        has_marks = any(mark in prefix + suffix for mark in MARKS)
        if has_marks or (name == "twinny" and (not prefix or prefix[0] == " ")):
            continue
        prompt = TEMPLATES[name].format(prefix=prefix, suffix=suffix)
        assert code_llama.ask("POST", path, {"prompt": prompt, PATHS[path]: 0}).status == 200
        expected.append(case[column])
    assert computed == expected
    assert len(expected) > 0.7 * len(cases)


def test_the_order_of_the_server(open_llm):
    with open_llm() as llm, serving(llm, suffix_first=True) as server:
        for given, first in ((None, True), (False, False), (True, True)):
            fields = {"prompt": "def f(", "suffix": "):\n", "max_tokens": 0}
            answer = server.post(
                "/v1/completions", **fields, suffix_first=given, return_token_ids=True
            )
            [choice] = answer.json["choices"]
            expected = llm.tokenizer.encode_infill("def f(", "):\n", suffix_first=first)
            assert choice["prompt_token_ids"] == expected


def test_a_filling_is_that_of_infill(served, llm):
    params = SamplingParams(max_tokens=24)
    expected = llm.infill("def add(first, ", "):\n    return first", params).text
    texts = [("def add(first, ", "):\n    return first")]
    [(prefix, suffix)] = texts
    greedy = {"temperature": 0, "max_tokens": 24}
    completion = served.post("/v1/completions", prompt=prefix, suffix=suffix, **greedy).json
    assert completion["choices"][0]["text"] == expected
    chat = served.post("/v1/fim/completions", prompt=prefix, suffix=suffix, **greedy).json
    assert chat["choices"][0]["message"]["content"] == expected
    fields = {"input_prefix": prefix, "input_suffix": suffix, "n_predict": 24}
    assert served.post("/infill", **fields).json["content"] == expected
    *events, last = served.post("/infill", **fields, stream=True).events
    assert "".join(event["content"] for event in events) == expected
    assert last["stop"] is True
    *events, done = served.post(
        "/v1/fim/completions", prompt=prefix, suffix=suffix, stream=True, **greedy
    ).events
    assert done == "[DONE]"
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == expected


def test_a_filling_ends_at_its_end_token(served, llm):
    """The end token is no text, and no stop string could match it."""
    bias = {str(llm.tokenizer.eot_id): 100}
    for path, fields in (
        ("/v1/completions", {"prompt": "a", "suffix": "b", "max_tokens": 99}),
        ("/v1/completions", {"prompt": "<PRE> a <SUF>b <MID>", "max_tokens": 99}),
    ):
        answer = served.ask("POST", path, {**fields, "temperature": 0, "logit_bias": bias}).json
        assert answer["choices"][0]["text"] == ""
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 1
    answer = served.post("/infill", input_prefix="a", input_suffix="b", logit_bias=bias).json
    assert (answer["content"], answer["stop_type"]) == ("", "eos")


def test_a_model_that_cannot_fill_in_says_so(tmp_path_factory):
    from helpers.tiny_llm import make_folder

    folder = make_folder(tmp_path_factory.mktemp("plain") / "plain", infilling=False)
    with LLM(folder, kv_memory="4MB") as llm, serving(llm) as server:
        for path, fields in (
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
            ("/v1/fim/completions", {"prompt": "a"}),
            ("/infill", {"input_prefix": "a"}),
        ):
            answer = server.ask("POST", path, fields)
            assert answer.status == 400
            assert "cannot infill" in answer.json["error"]["message"]


def test_a_hundred_thousand_tokens(mini_folder):
    """Neither text is cut: one is before the hole, one behind."""
    with (
        LLM(mini_folder, kv_memory="64MB", max_num_batched_tokens=8192) as llm,
        serving(llm) as server,
    ):
        line = "def f(x):\n    return x\n"
        encode = llm.tokenizer.encode_plain
        per_line = len(encode(line * 2)) - len(encode(line))
        prefix, suffix = line * (60_000 // per_line), line * (40_000 // per_line + 10)
        expected = llm.tokenizer.encode_infill(prefix, suffix)
        assert len(expected) > 100_000
        fields = {"prompt": prefix, "suffix": suffix, "max_tokens": 1, "return_token_ids": True}
        [choice] = server.post("/v1/completions", **fields).json["choices"]
        assert choice["prompt_token_ids"] == expected
        template = {"prompt": f"<PRE> {prefix} <SUF>{suffix} <MID>"}
        for path, fields in (
            ("/infill", {"input_prefix": prefix, "input_suffix": suffix}),
            ("/completion", template),
        ):
            answer = server.post(path, **fields, n_predict=1).json
            assert (answer["tokens_evaluated"], answer["truncated"]) == (len(expected), False)
        fields = {"prompt": prefix, "suffix": suffix, "max_tokens": 1, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        *_, usage, _ = server.post("/v1/fim/completions", **fields).events
        assert usage["usage"]["prompt_tokens"] == len(expected)
