"""POST /v1/completions: every field, the answer's form, and what is refused by which name."""

import json
import math

import pytest

from codellama_rt import SamplingParams

PROMPT = "def add(first, second):"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
LONG_GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


def text_of(answer, index=0):
    assert answer.status == 200, answer.body
    return answer.json["choices"][index]["text"]


def streamed(answer):
    """Text and end of each choice of a stream."""
    events, texts, ends = answer.events, {}, {}
    assert events.pop() == "[DONE]"
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                assert choice["index"] not in ends
                ends[choice["index"]] = choice["finish_reason"]
    return texts, ends


def test_the_answer_has_openais_form(served):
    answer = served.post("/v1/completions", **GREEDY)
    value = answer.json
    assert answer.body == json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    assert value["id"].startswith("cmpl-")
    assert (value["object"], value["model"]) == ("text_completion", "codellama")
    [choice] = value["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert choice["finish_reason"] == "length"
    usage = value["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.8, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"n": 3, "temperature": 1, "seed": -5},
        {"stop": ["e", "="], "include_stop_str_in_output": True},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {"100": 50, "101": -100}, "bad_words": ["x"]},
        {"allowed_token_ids": [70, 71, 72], "min_tokens": 3, "stop_token_ids": [70]},
        {"skip_special_tokens": False, "ignore_eos": True},
    ],
)
def test_text_is_that_of_generate(served, llm, fields, stream):
    """The same parameters, streamed or not, give what LLM.generate gives."""
    given = {"temperature": 0, "max_tokens": 40, **fields}
    direct = {k: v for k, v in given.items() if k not in ("seed", "logit_bias")}
    if "seed" in given:
        direct["seed"] = given["seed"] % 2**64
    if "logit_bias" in given:
        direct["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
    expected = llm.generate(PROMPT, SamplingParams(**direct))
    answer = served.post("/v1/completions", prompt=PROMPT, stream=stream, **given)
    if stream:
        texts, ends = streamed(answer)
    else:
        texts = {c["index"]: c["text"] for c in answer.json["choices"]}
        ends = {c["index"]: c["finish_reason"] for c in answer.json["choices"]}
    # a character that the stream never completed appears at the end in both
    assert texts == {one.index: one.text for one in expected}
    assert ends == {one.index: one.finish_reason for one in expected}


def test_all_prompts_are_answered_in_order(served, llm):
    prompts = [PROMPT, "class Stack:", "x"]
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=8)
    expected = [one.text for one in llm.generate(prompts, params)]
    fields = {"prompt": prompts, "n": 2, "temperature": 1, "seed": 3, "max_tokens": 8}
    choices = served.post("/v1/completions", **fields).json["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == expected
    texts, _ = streamed(served.post("/v1/completions", stream=True, **fields))
    assert [texts[i] for i in range(6)] == expected


def test_token_ids_are_taken_as_they_are(served, llm):
    ids = llm.tokenizer.encode(PROMPT)
    whole = served.post("/v1/completions", **{**GREEDY, "prompt": ids, "return_token_ids": True})
    [choice] = whole.json["choices"]
    assert choice["text"] == text_of(served.post("/v1/completions", **GREEDY))
    assert choice["prompt_token_ids"] == ids
    direct = llm.generate([ids], SamplingParams(max_tokens=12))[0]
    assert choice["token_ids"] == direct.token_ids
    several = served.post("/v1/completions", **{**GREEDY, "prompt": [ids, ids[1:]]}).json
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) - 1
    without = {**GREEDY, "add_special_tokens": False, "return_token_ids": True}
    assert (
        served.post("/v1/completions", **without).json["choices"][0]["prompt_token_ids"]
        == (ids[1:])
    )
    cut = {**GREEDY, "truncate_prompt_tokens": 3, "return_token_ids": True}
    assert served.post("/v1/completions", **cut).json["choices"][0]["prompt_token_ids"] == ids[-3:]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(served, llm, stream):
    params = SamplingParams(max_tokens=6, logprobs=3)
    expected = llm.generate(PROMPT, params)[0]
    answer = served.post(
        "/v1/completions", **{**GREEDY, "max_tokens": 6}, logprobs=3, stream=stream
    )
    parts = answer.events[:-1] if stream else [answer.json]
    found = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for part in parts:
        for name, values in part["choices"][0]["logprobs"].items():
            found[name] += values
    assert found["token_logprobs"] == [
        row[i].logprob for i, row in zip(expected.token_ids, expected.logprobs, strict=True)
    ]
    for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert value == max(top.values())
    lengths = [len(text) for text in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_scoring_as_lm_eval_does_it(served, llm):
    """Log-probabilities of a prompt's ids as they are, with exactly one generated token."""
    ids = llm.tokenizer.encode("def add(first):", bos=False)
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    logprobs = served.post("/v1/completions", seed=1234, **body).json["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    logits = llm.logits(ids).astype("float64")
    for i, token_id in enumerate(ids[1:]):
        expected = logits[i][token_id] - math.log(sum(math.exp(x) for x in logits[i]))
        assert logprobs["token_logprobs"][i + 1] == pytest.approx(expected, abs=1e-6)
    nothing = served.post("/v1/completions", **{**body, "max_tokens": 0}).json["choices"][0]
    assert nothing["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    assert nothing["finish_reason"] == "length"


def test_echo(served):
    alone = text_of(served.post("/v1/completions", **GREEDY))
    assert text_of(served.post("/v1/completions", **GREEDY, echo=True)) == PROMPT + alone
    texts, _ = streamed(served.post("/v1/completions", **GREEDY, echo=True, n=2, stream=True))
    assert texts == {0: PROMPT + alone, 1: PROMPT + alone}
    assert text_of(served.post("/v1/completions", prompt=PROMPT, max_tokens=0, echo=True)) == PROMPT


def test_names_of_tokens_by_id_and_prompt_logprobs(served, llm):
    body = {**GREEDY, "logprobs": 1, "return_tokens_as_token_ids": True, "prompt_logprobs": 1}
    [choice] = served.post("/v1/completions", **body).json["choices"]
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["tokens"])
    ids = llm.tokenizer.encode(PROMPT)
    assert choice["prompt_logprobs"][0] is None
    for token_id, row in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        assert row[str(token_id)].keys() == {"logprob", "rank", "decoded_token"}


def test_the_best_of_several(served, llm):
    params = SamplingParams(n=4, temperature=1.0, seed=9, max_tokens=6, logprobs=0)

    def mean(one):
        rows = zip(one.token_ids, one.logprobs, strict=True)
        return sum(row[i].logprob for i, row in rows) / len(one.token_ids)

    scored = sorted(llm.generate(PROMPT, params), key=mean, reverse=True)
    body = {"prompt": PROMPT, "temperature": 1, "seed": 9, "max_tokens": 6, "best_of": 4, "n": 2}
    answer = served.post("/v1/completions", **body).json
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in scored[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in scored)


def test_usage_in_streams(served):
    options = {"include_usage": True}
    *events, last, done = served.post(
        "/v1/completions", **GREEDY, stream=True, stream_options=options
    ).events
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 12)
    assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in [*events, last]}) == 1
    options["continuous_usage_stats"] = True
    *events, _, _ = served.post(
        "/v1/completions", **GREEDY, stream=True, stream_options=options
    ).events
    assert events[-1]["usage"]["completion_tokens"] == 12
    *events, _ = served.post("/v1/completions", **GREEDY, stream=True).events
    assert all("usage" not in event for event in events)


FORMS = [
    ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"enum": [1, 2]}},
            }
        },
        lambda text: json.loads(text) in (1, 2),
    ),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: text.isdecimal()),
    (
        {"structured_outputs": {"json": {"type": "boolean"}}},
        lambda t: t.strip() in ("true", "false"),
    ),
    ({"structured_outputs": {"grammar": 'root ::= "a" "b"'}}, lambda text: text == "ab"),
]


@pytest.mark.parametrize(("form", "holds"), FORMS, ids=[str(form)[:60] for form, _ in FORMS])
def test_forms_of_the_output(served, form, holds):
    pytest.importorskip("llguidance")
    bias = form == {"response_format": {"type": "json_object"}}
    extra = {"logit_bias": {"128": 100}} if bias else {}  # "}": an object that ends
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 200, **form, **extra}
    answer = served.post("/v1/completions", **body)
    assert answer.json["choices"][0]["finish_reason"] == "stop", answer.body
    assert holds(text_of(answer))


def test_null_is_as_good_as_nothing(served):
    CompletionRequest = pytest.importorskip("codellama_rt.serve.protocol").CompletionRequest
    names = set(CompletionRequest.__struct_fields__) - GREEDY.keys()
    body = {**GREEDY, **dict.fromkeys(names), "unknown": {"a": [1]}, "guided_json": {}}
    assert text_of(served.post("/v1/completions", **body)) == text_of(
        served.post("/v1/completions", **GREEDY)
    )
    default = served.post("/v1/completions", prompt=PROMPT, max_tokens=None, ignore_eos=True).json
    assert default["usage"]["completion_tokens"] == 16


def test_any_integer_is_a_seed(served):
    for value in (-1, 0, -(2**63), 2**63 - 1):
        assert served.post("/v1/completions", **GREEDY, seed=value).status == 200
    assert served.post("/v1/completions", **{**GREEDY, "max_tokens": 1e1}).status == 200


REFUSED = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "5"}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": 0}),
    ("n", {"n": 0}),
    ("n", {"n": 1000}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": 2, "stream": True}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": [1]}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"99999": 1}}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": "1"}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("stop_token_ids", {"stop_token_ids": [10**6]}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": ["a", 5]}),
    ("prompt", {"prompt": [[1.5]]}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": [1, True]}),
    ("prompt", {"prompt": ["x"] * 257}),
    ("echo", {"echo": True, "suffix": "x"}),
    ("response_format", {"response_format": {"type": "xml"}}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
    ("stream_options", {"stream_options": 1}),
    ("request_id", {"request_id": "x" * 129}),
    ("priority", {"priority": 1.5}),
    ("cache_salt", {"cache_salt": ""}),
    ("cache_salt", {"cache_salt": "a/b"}),
    ("cache_salt", {"cache_salt": "x" * 129}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
]


@pytest.mark.parametrize(("name", "fields"), REFUSED, ids=[str(f)[:50] for _, f in REFUSED])
def test_what_is_refused_is_named(served, name, fields):
    served.wait_until_idle()  # with what earlier tests have left
    answer = served.post("/v1/completions", **{**GREEDY, **fields})
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name, error
    assert error["message"]
    assert served.is_idle(), "nothing was queued"


def test_a_missing_prompt(served):
    error = served.post("/v1/completions", max_tokens=1).json["error"]
    assert error["param"] == "prompt"


def test_a_prompt_that_is_too_long(served):
    error = served.post("/v1/completions", prompt=[5] * 2048).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (2048, 2048)
    assert served.post("/v1/completions", prompt=[5] * 2048, max_tokens=0).status == 200


def test_an_unknown_model(served):
    answer = served.post("/v1/completions", **GREEDY, model="gpt-4")
    assert answer.status == 404
    assert answer.json["error"]["code"] == "model_not_found"
    for name in ("codellama:7b", "", None):
        assert served.post("/v1/completions", **GREEDY, model=name).status == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag is not supported"),
        ({"response_format": {"type": "structural_tag"}}, "structural_tag"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be 0 to 20, got -1"),
        ({"logprobs": -1}, "logprobs must be 0 to 20, got -1"),
    ],
)
def test_what_is_not_supported(served, fields, message):
    """No client that is known sends these fields of vLLM's: the answer names them."""
    answer = served.post("/v1/completions", **GREEDY, **fields)
    assert answer.status == 400
    error = answer.json["error"]
    assert message in error["message"]
    assert error["param"] == next(iter(fields))


def test_salts_keep_prefixes_apart(served):
    def cached(**fields):
        body = {"prompt": [7] * 300, "max_tokens": 1, **fields}
        usage = served.post("/v1/completions", **body).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="yours") == 0
    assert cached(cache_salt="mine") > 200
