"""Clients that people have: the libraries themselves, and the requests that editors' plugins send.

The bodies below were recorded from, or read in the sources of, the versions that docs/serving.md
names. Addresses, names and templates are those of the pages in docs/clients.
"""

import json
import os
import re
from pathlib import Path

import pytest
from helpers.served import serving
from hypothesis import HealthCheck, given, settings

from codellama_rt import SamplingParams
from codellama_rt.serve.openapi import description

PAGES = Path(__file__).resolve().parents[2] / "docs" / "clients"
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


def pieces(page, language):
    """The configuration files of a client's page, as values."""
    text = (PAGES / f"{page}.md").read_text()
    return [
        parsed(code, language)
        for code in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def parsed(code, language):
    if language == "json":
        return json.loads(code)
    if language == "yaml":
        return pytest.importorskip("yaml").safe_load(code)
    return pytest.importorskip("tomllib").loads(code)


def path_of(url, port=8000):
    """The path of an address in a page, whose server is this one."""
    assert url.startswith(f"http://127.0.0.1:{port}"), url
    return url.removeprefix(f"http://127.0.0.1:{port}")


def test_every_page_is_in_the_table():
    table = (PAGES.parent / "serving.md").read_text()
    pages = sorted(page.name for page in PAGES.glob("*.md"))
    assert sorted(re.findall(r"\(clients/([\w-]+\.md)\)", table)) == pages
    assert len(pages) == 9
    for page in PAGES.glob("*.md"):
        assert "\nTried: " in page.read_text()


def test_continue(served, filling, stopped):
    """Providers openai, vllm and lmstudio; then llama.cpp."""
    [config] = pieces("continue", "yaml")
    [model] = config["models"]
    assert "codellama" in model["model"]  # by which it chooses the template
    body = {
        "model": model["model"], "prompt": TEMPLATE, "stream": True, "stop": STOPS,
        "max_tokens": 20, "temperature": 0,
    }  # fmt: skip
    key = {"Authorization": f"Bearer {model['apiKey']}"}
    base = path_of(model["apiBase"])
    *events, done = served.ask("POST", f"{base}/completions", body, key).events
    assert done == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == stopped
    assert served.get(f"{base}/models").json["data"][0]["max_model_len"] == 2048
    body = {"prompt": TEMPLATE, "n_predict": 20, "temperature": 0, "stream": True}
    events = served.post("/completion", **body).events
    assert "".join(event["content"] for event in events) == filling
    refused = served.ask("POST", f"{base}/completions", {"prompt": "a", "top_p": 5}, key)
    assert refused.json["error"]["message"]


def test_continue_fim(served, filling):
    """Provider mistral, which sends its key twice."""
    body = {"model": "codellama", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 20,
            "temperature": 0, "stop": [], "stream": True}  # fmt: skip
    keys = {"Authorization": "Bearer unused", "x-api-key": "unused"}
    *events, _ = served.ask("POST", "/v1/fim/completions", body, keys).events
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == filling


def test_tabby(served, filling):
    """With /completions it wants an end before DONE, which it cannot parse."""
    model = pieces("tabby", "toml")[0]["model"]
    completion, chat = model["completion"]["http"], model["chat"]["http"]
    body = {"model": completion["model_name"], "prompt": PREFIX, "suffix": SUFFIX,
            "max_tokens": 20, "temperature": 0, "presence_penalty": 0, "stream": True}  # fmt: skip
    path = f"{path_of(completion['api_endpoint'])}/completions"
    answer = served.post(path, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, _ = answer.events
    assert all(isinstance(event["choices"][0]["text"], str) for event in events)
    assert "".join(event["choices"][0]["text"] for event in events) == filling
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert served.post(path, **{**body, "suffix": None}).status == 200
    messages = [{"role": "user", "content": "a"}]
    path = f"{path_of(chat['api_endpoint'])}/chat/completions"
    answer = served.post(path, model=chat["model_name"], messages=messages, max_tokens=2)
    assert answer.status == 200


def test_tabby_with_a_template(served, filling):
    """Its parser wants `content` and `stop` in each event, and panics otherwise."""
    completion = pieces("tabby", "toml")[1]["model"]["completion"]["http"]
    prompt = completion["prompt_template"].format(prefix=PREFIX, suffix=SUFFIX)
    body = {"prompt": prompt, "n_predict": 20, "seed": 3, "temperature": 0.0, "stream": True,
            "penalty_last_n": 0, "presence_penalty": 0.0}  # fmt: skip
    events = served.post(f"{path_of(completion['api_endpoint'])}/completion", **body).events
    assert all({"content", "stop"} <= event.keys() for event in events)
    assert "".join(event["content"] for event in events) == filling
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_twinny(served, filling):
    [settings] = pieces("twinny", "yaml")
    prompt = f"<PRE>{PREFIX} <SUF> {SUFFIX} <MID>"
    body = {"model": settings["Model Name"], "prompt": prompt, "stream": True, "max_tokens": 20,
            "temperature": 0, "options": {"temperature": 0, "num_predict": 20}}  # fmt: skip
    *events, _ = served.post(settings["Path"], **body).events
    assert "".join(event["choices"][0]["text"] for event in events) == filling


def test_zed(served, stopped):
    """Not streamed; all of these fields are required."""
    [settings] = pieces("zed", "json")
    server = settings["edit_predictions"][settings["edit_predictions"]["provider"]]
    assert server["model"].partition(":")[0] == "codellama"  # by which it infers the template
    body = {"model": server["model"], "prompt": TEMPLATE, "stop": STOPS[:3], "max_tokens": 20}
    answer = served.post(path_of(server["api_url"]), **body, temperature=0).json
    assert {"id", "object", "created", "model", "choices", "usage"} <= answer.keys()
    assert answer["choices"][0]["text"] == stopped
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= answer["usage"].keys()


def test_llama_vscode(served, filling):
    """It asks for the state, the context and the models before it fills in."""
    [settings] = pieces("llama-vscode", "json")
    base = path_of(settings["llama-vscode.endpoint"], port=8012)
    assert served.get(f"{base}/health").json["status"] == "ok"
    assert served.get(f"{base}/props").json["default_generation_settings"]["n_ctx"] == 2048
    assert served.get(f"{base}/v1/models").json["data"][0]["id"] == "codellama"
    before, _, line = PREFIX.rpartition("\n")
    body = {
        "input_prefix": before, "input_suffix": SUFFIX, "prompt": line, "n_predict": 20,
        "input_extra": [], "top_k": 40, "top_p": 0.99, "stream": False, "n_cmpl": 1, "lora": [],
        "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "t_max_prompt_ms": 500,
        "t_max_predict_ms": settings["llama-vscode.t_max_predict_ms"] * 1000, "n_indent": 0,
    }  # fmt: skip
    answer = served.ask("POST", f"{base}/infill", body, {"Authorization": "Bearer "}).json
    assert answer["content"] == filling
    assert {"timings", "tokens_cached", "truncated"} <= answer.keys()
    assert answer["generation_settings"]["n_ctx"] == 2048
    chat = path_of(settings["llama-vscode.endpoint_chat"], port=8012) + "/v1/chat/completions"
    body = {"model": settings["llama-vscode.ai_model"], "stream": True, "max_tokens": 2}
    *events, _ = served.post(chat, **body, messages=[{"role": "user", "content": "a"}]).events
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


def test_llama_vim_by_instruction(served, llm):
    """A warm-up that generates nothing, then a stream without a limit of its own."""
    messages = [{"role": "system", "content": "Edit."}, {"role": "user", "content": "Reverse it."}]
    common = {"id_slot": 0, "messages": messages, "cache_prompt": True, "model": ""}
    warm = {"samplers": [], "n_predict": 0, "stream": False, "response_fields": [""]}
    usage = served.post("/v1/chat/completions", **common, **warm).json["usage"]
    assert usage["completion_tokens"] == 0
    sampling = {"min_p": 0.1, "temperature": 0.0, "samplers": ["min_p", "temperature"]}
    answer = served.post("/v1/chat/completions", **common, **sampling, stream=True, max_tokens=9)
    *events, _ = answer.events
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == llm.chat(messages, SamplingParams(max_tokens=9)).text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_limit_by_llama_cpps_name(served, path):
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "ignore_eos": True}

    def num_tokens(**limits):
        return served.post(path, **body, **limits).json["usage"]["completion_tokens"]

    assert num_tokens(n_predict=3) == 3
    assert num_tokens(n_predict=3, max_tokens=5) == 5
    assert num_tokens(n_predict=-1) > 1900  # to the end of the context


def test_aider(served):
    [config, [settings]] = pieces("aider", "yaml")
    assert config["model"] == settings["name"]
    messages = [
        {"role": role, "content": "a"}
        for role in ("system", "user", "assistant", "user", "assistant", "user")
    ]
    body = {"model": config["model"].removeprefix("openai/"), "messages": messages}
    body |= {"stream": True, "temperature": 0, **settings["extra_params"]} | {"max_tokens": 3}
    path = f"{path_of(config['openai-api-base'])}/chat/completions"
    *events, done = served.post(path, **body).events
    assert done == "[DONE]"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


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


def test_lm_eval(served, llm):
    """Scores of token ids as they are, and the tokenizer's description first."""
    line = (PAGES / "lm-eval.md").read_text().partition("--model_args ")[2].split()[0]
    arguments = dict(part.split("=") for part in line.split(","))
    assert arguments["tokenizer_backend"] == "remote"
    info = served.get("/tokenizer_info").json
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()
    ids = llm.tokenizer.encode_plain("def f(x): return x")
    body = {"model": arguments["model"], "prompt": [ids], "max_tokens": 1, "logprobs": 1,
            "echo": True, "temperature": 0, "seed": 1234}  # fmt: skip
    [choice] = served.post(path_of(arguments["base_url"]), **body).json["choices"]
    found = choice["logprobs"]["token_logprobs"]
    params = SamplingParams(max_tokens=1, logprobs=0, prompt_logprobs=0)
    [expected] = llm.generate([ids], params)
    rows = [*expected.prompt_logprobs[1:], *expected.logprobs]
    assert found[0] is None
    assert found[1:] == [
        row[token_id].logprob
        for row, token_id in zip(rows, [*ids[1:], *expected.token_ids], strict=True)
    ]


def test_evalplus(served):
    body = {"model": "codellama", "messages": [{"role": "user", "content": "a"}], "n": 2,
            "max_completion_tokens": 5, "temperature": 0.8, "top_p": 0.95}  # fmt: skip
    assert len(served.post("/v1/chat/completions", **body).json["choices"]) == 2


def test_open_webui(served):
    settings = dict(
        line.split("=", 1)
        for line in (PAGES / "open-webui.md").read_text().splitlines()
        if re.match(r"[A-Z_]+=", line)
    )
    base = path_of(settings["OPENAI_API_BASE_URL"])
    key = {"Authorization": f"Bearer {settings['OPENAI_API_KEY']}"}
    model = served.get(f"{base}/models", **key).json["data"][0]["id"]
    parts = [{"type": "text", "text": "a"}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    for stream in (True, False):
        answer = served.ask("POST", f"{base}/chat/completions", {**body, "stream": stream}, key)
        assert answer.status == 200


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
    responses = description()["paths"][operation.path]["post"]["responses"]

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
        assert str(answer.status) in responses, (sent, answer.status)
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
