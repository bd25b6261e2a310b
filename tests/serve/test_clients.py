"""Clients that people have: the libraries themselves, and the requests that editors' plugins send.

The bodies below were recorded from, or read in the sources of, the versions that docs/serving.md
names.
"""

import json
import os

import pytest
from helpers.served import serving
from hypothesis import HealthCheck, given, settings

from codellama_rt import SamplingParams

PREFIX, SUFFIX = "def add(first, ", "):\n    return first"
TEMPLATE = f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>"
STOPS = ["<PRE>", "<SUF>", "<MID>", "<EOT>"]
MAX_EXAMPLES = int(os.environ.get("CODELLAMA_RT_SCHEMATHESIS_EXAMPLES", "25"))


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def filling(llm):
    return llm.infill(PREFIX, SUFFIX, SamplingParams(max_tokens=20)).text


@pytest.fixture(scope="module")
def stopped(llm):
    """The filling of a client whose stop strings are names of control tokens."""
    return llm.infill(PREFIX, SUFFIX, SamplingParams(max_tokens=20, stop=STOPS)).text


def test_openai_completions(client, llm):
    expected = llm.generate("def f(", SamplingParams(max_tokens=9)).pop().text
    fields = {"model": "codellama", "prompt": "def f(", "max_tokens": 9, "temperature": 0}
    answer = client.completions.create(**fields, logprobs=2)
    assert answer.choices[0].text == expected
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens == 9
    parts = list(
        client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected
    assert parts[-1].usage.completion_tokens == 9


def test_openai_fills_in(client, filling):
    answer = client.completions.create(
        model="codellama", prompt=PREFIX, suffix=SUFFIX, max_tokens=20, temperature=0
    )
    assert answer.choices[0].text == filling


def test_openai_chat(client, llm):
    messages = [{"role": "user", "content": "Reverse a list."}]
    expected = llm.chat(messages, SamplingParams(max_tokens=9)).text
    fields = {"model": "codellama", "messages": messages, "max_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == expected
    assert len(answer.choices[0].logprobs.content) == 9
    stream = client.chat.completions.create(**fields, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == expected


def test_openai_tools_and_schemas(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    messages = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(
        model="codellama",
        messages=messages,
        temperature=0,
        tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"a"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(
        model="codellama", messages=messages, temperature=0, response_format=form
    )
    assert json.loads(answer.choices[0].message.content).keys() == {"a"}


def test_openai_models_and_errors(client):
    openai = pytest.importorskip("openai")
    assert [model.id for model in client.models.list()] == ["codellama", "codellama:7b"]
    assert client.models.retrieve("codellama:7b").id == "codellama:7b"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="codellama", prompt="a", top_p=5)
    assert refused.value.param == "top_p"


def test_openai_keys(open_llm):
    openai = pytest.importorskip("openai")
    with open_llm() as llm, serving(llm, api_keys=("k",)) as server:
        for key, error in (("k", None), ("wrong", openai.AuthenticationError)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if error is None:
                    client.models.list()
                else:
                    with pytest.raises(error):
                        client.models.list()


def test_continue(served, filling, stopped):
    body = {
        "model": "codellama", "prompt": TEMPLATE, "stream": True, "stop": STOPS,
        "max_tokens": 20, "temperature": 0,
    }  # fmt: skip
    *events, done = served.post("/v1/completions", **body).events
    assert done == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == stopped
    body = {"prompt": TEMPLATE, "n_predict": 20, "temperature": 0, "stream": True}
    events = served.post("/completion", **body).events
    assert "".join(event["content"] for event in events) == filling


def test_continue_fim(served, filling):
    body = {"model": "codellama", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 20,
            "temperature": 0, "stop": [], "stream": True}  # fmt: skip
    *events, _ = served.post("/v1/fim/completions", **body).events
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == filling


def test_tabby(served, filling):
    """Its parser wants `content` and `stop` in each event; with /completions an end before DONE."""
    body = {"prompt": TEMPLATE, "n_predict": 20, "seed": 3, "temperature": 0.0, "stream": True,
            "penalty_last_n": 0, "presence_penalty": 0.0}  # fmt: skip
    events = served.post("/completion", **body).events
    assert all({"content", "stop"} <= event.keys() for event in events)
    assert "".join(event["content"] for event in events) == filling
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    body = {"model": "codellama", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 20,
            "temperature": 0, "presence_penalty": 0, "stream": True}  # fmt: skip
    answer = served.post("/v1/completions", **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, _ = answer.events
    assert all(isinstance(event["choices"][0]["text"], str) for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert served.post("/v1/completions", **{**body, "suffix": None}).status == 200


def test_twinny(served, filling):
    prompt = f"<PRE>{PREFIX} <SUF> {SUFFIX} <MID>"
    body = {"prompt": prompt, "stream": True, "max_tokens": 20, "temperature": 0}
    body["options"] = {"temperature": 0, "num_predict": 20}
    *events, _ = served.post("/v1/completions", **body).events
    assert "".join(event["choices"][0]["text"] for event in events) == filling


def test_zed(served, stopped):
    """Not streamed; all of these fields are required."""
    body = {"model": "codellama:7b", "prompt": TEMPLATE, "stop": STOPS[:3], "max_tokens": 20}
    answer = served.post("/v1/completions", **body, temperature=0).json
    assert {"id", "object", "created", "model", "choices", "usage"} <= answer.keys()
    assert answer["choices"][0]["text"] == stopped
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= answer["usage"].keys()


def test_langchain(served):
    """A list of prompts, and explicit nulls."""
    body = {"model": "codellama", "prompt": ["def f("], "n": 1, "logprobs": None, "seed": None,
            "max_tokens": 4, "frequency_penalty": 0, "top_p": 1, "logit_bias": None}  # fmt: skip
    assert len(served.post("/v1/completions", **body).json["choices"]) == 1


def test_vllm_bench_and_guidellm(served):
    body = {
        "model": "codellama", "prompt": "a", "max_tokens": 5, "logprobs": None, "ignore_eos": True,
        "repetition_penalty": 1.0, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    *events, last, _ = served.post("/v1/completions", **body).events
    assert all(event["usage"] for event in events)
    assert last["usage"]["completion_tokens"] == 5


def test_lm_eval_before_it_scores(served):
    info = served.get("/tokenizer_info").json
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()


def test_evalplus(served):
    body = {"model": "codellama", "messages": [{"role": "user", "content": "a"}], "n": 2,
            "max_completion_tokens": 5, "temperature": 0.8, "top_p": 0.95}  # fmt: skip
    assert len(served.post("/v1/chat/completions", **body).json["choices"]) == 2


def test_open_webui(served):
    assert served.get("/v1/models", Authorization="Bearer ").json["data"][0]["id"] == "codellama"
    parts = [{"type": "text", "text": "a"}]
    body = {"model": "codellama", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    assert served.post("/v1/chat/completions", **body, stream=True).status == 200


def test_the_description_by_schemathesis(served):
    """Requests made of /openapi.json, valid and not: never a 5xx, and answers as described."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(served.get("/openapi.json").json)
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [one for one in operations if one.method.upper() == "POST"]
    assert len(posts) == 7
    for operation in posts:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            _ask_with_examples(served, operation, mode)


def _ask_with_examples(served, operation, mode):
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=MAX_EXAMPLES, suppress_health_check=list(HealthCheck))
    def check(case):
        body = case.body
        if isinstance(body, dict):
            limits = dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), 2)
            body = {**body, **limits, "n": 1}
        try:
            sent = json.dumps(body).encode()
        except (TypeError, ValueError):  # what JSON does not have
            return
        answer = served.ask("POST", operation.path, sent)
        assert answer.status < 500 or answer.status == 503, (sent, answer.body)
        if answer.status != 200:
            assert answer.json["error"]["message"]

    check()


@pytest.mark.parametrize("stream", [True, False])
def test_llm(served, llm, stream, tmp_path, monkeypatch):
    """Simon Willison's command line's library; its streams ask for the usage."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    models = pytest.importorskip("llm.default_plugins.openai_models")
    expected = llm.generate("def f(", SamplingParams(max_tokens=9)).pop().text
    address = {"model_name": "codellama", "api_base": f"{served.url}/v1"}
    model = models.Completion("codellama", **address)
    answer = model.prompt("def f(", key="k", stream=stream, max_tokens=9, temperature=0)
    assert answer.text() == expected
    chat = models.Chat("codellama", **address)
    answer = chat.prompt("Reverse a list.", key="k", stream=stream, max_tokens=9, temperature=0)
    messages = [{"role": "user", "content": "Reverse a list."}]
    assert answer.text() == llm.chat(messages, SamplingParams(max_tokens=9)).text
    assert answer.usage().output == 9
