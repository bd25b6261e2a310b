"""POST /v1/chat/completions."""

import json

import pytest

from codellama_rt import SamplingParams

MESSAGES = [{"role": "user", "content": "Reverse a list."}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 10}
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"fast": {"type": "boolean"}},
    "required": ["fast"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "go", "parameters": SCHEMA}}


def content(answer):
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["message"]["content"]


def test_the_answer_is_that_of_chat(served, llm):
    expected = llm.chat(MESSAGES, SamplingParams(max_tokens=10)).text
    answer = served.post(PATH, **GREEDY)
    assert content(answer) == expected
    value = answer.json
    assert value["object"] == "chat.completion"
    assert value["choices"][0]["message"]["role"] == "assistant"
    first, *events, last, done = served.post(PATH, **GREEDY, stream=True).events
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == expected
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert {e["object"] for e in (first, *events, last)} == {"chat.completion.chunk"}


def test_messages_as_clients_write_them(served):
    system = [{"role": "system", "content": "Be brief."}]
    plain = content(served.post(PATH, **{**GREEDY, "messages": system + MESSAGES}))
    developer = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]
    parts = [
        {"role": "user", "name": "me", "content": [{"type": "text", "text": "Reverse a list."}]}
    ]
    assert content(served.post(PATH, **{**GREEDY, "messages": developer + parts})) == plain


def test_limits_and_samples(served):
    fields = {"messages": MESSAGES, "temperature": 1, "seed": 1, "n": 2}
    answer = served.post(PATH, **fields, max_completion_tokens=3, max_tokens=9).json
    assert answer["usage"]["completion_tokens"] <= 6
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    events = served.post(PATH, **fields, max_completion_tokens=3, stream=True).events[:-1]
    for i in range(2):
        parts = [c["delta"] for e in events for c in e["choices"] if c["index"] == i]
        assert "".join(part.get("content", "") for part in parts) == texts[i]
        assert parts[0]["role"] == "assistant"


def test_log_probabilities(served):
    [choice] = served.post(PATH, **GREEDY, logprobs=True, top_logprobs=2).json["choices"]
    assert len(choice["logprobs"]["content"]) == 10
    for one in choice["logprobs"]["content"]:
        assert one.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(one["top_logprobs"]) == 2
        assert one["logprob"] == one["top_logprobs"][0]["logprob"]
    plain = served.post(PATH, **GREEDY, logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_json_schemas(served):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    answer = served.post(PATH, messages=MESSAGES, temperature=0, response_format=form)
    assert json.loads(content(answer)).keys() == {"fast"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
def test_a_tool_that_must_be_called(served, choice):
    pytest.importorskip("llguidance")
    fields = {"messages": MESSAGES, "temperature": 0, "tools": [TOOL], "tool_choice": choice}
    [found] = served.post(PATH, **fields).json["choices"]
    [call] = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls"
    assert (call["type"], call["function"]["name"]) == ("function", "go")
    assert json.loads(call["function"]["arguments"]).keys() == {"fast"}
    deltas = [
        e["choices"][0]["delta"] for e in served.post(PATH, **fields, stream=True).events[:-1]
    ]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "go"
    arguments = "".join(one["function"]["arguments"] for one in calls)
    assert arguments == call["function"]["arguments"]


def test_tools_that_may_be_called_are_not(served):
    plain = content(served.post(PATH, **GREEDY))
    for choice in (None, "auto", "none"):
        assert content(served.post(PATH, **GREEDY, tools=[TOOL], tool_choice=choice)) == plain


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "nobody", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user", "content": 5}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages", {"messages": "x"}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "tools": [TOOL, TOOL]}),
        ("tool_choice", {"tool_choice": {"function": {"name": "stop"}}, "tools": [TOOL]}),
        ("tools", {"tools": [{"type": "function"}]}),
    ],
)
def test_what_is_refused_is_named(served, name, fields):
    answer = served.post(PATH, **{**GREEDY, **fields})
    assert answer.status == 400, answer.body
    assert answer.json["error"]["param"] == name
