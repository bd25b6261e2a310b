"""Tokens that come in one event: text, ids and log-probabilities are those of the whole answer."""

import pytest
from helpers.served import serving

SAMPLED = {"temperature": 1.0, "seed": 3, "ignore_eos": True}
COUNTS = {"max_tokens": 60, "n": 2, "return_token_ids": True, **SAMPLED}
LLAMA_CPP = {"n_predict": 60, "n_probs": 2, "return_tokens": True, **SAMPLED}
ASKED = {
    "/v1/completions": {"prompt": ["def f(", "x = "], "logprobs": 2, "echo": True, **COUNTS},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "top_logprobs": 2,
        **COUNTS,
    },
    "/v1/fim/completions": {"prompt": "def f(", "suffix": "):", **COUNTS},
    "/completion": {"prompt": "def f(", **LLAMA_CPP},
    "/infill": {"input_prefix": "def f(", "input_suffix": "):", **LLAMA_CPP},
}


@pytest.fixture(scope="module", params=[0, 0.02, 3600], ids=["each", "some", "all"])
def server(open_llm, request):
    """Events of each step, of the usual time, and of all there is after the first."""
    with open_llm() as llm, serving(llm, stream_interval_s=request.param) as server:
        server.interval_s = request.param
        yield server


def parts(events):
    """(text, token ids, log-probabilities) of each choice's events, in OpenAI's forms."""
    found = {}
    for event in events:
        for choice in event["choices"]:
            texts, ids, rows = found.setdefault(choice["index"], ([], [], []))
            message = choice.get("message") or choice.get("delta") or {}
            texts.append(choice.get("text") or message.get("content") or "")
            ids += choice.get("token_ids") or []
            logprobs = choice["logprobs"] or {}
            rows += logprobs.get("content") or list(
                zip(
                    *(logprobs.get(name, []) for name in ("tokens", "text_offset")),
                    *(logprobs.get(name, []) for name in ("token_logprobs", "top_logprobs")),
                    strict=True,
                )
            )
    return {index: ("".join(texts), ids, rows) for index, (texts, ids, rows) in found.items()}


@pytest.mark.parametrize("path", [path for path in ASKED if path.startswith("/v1")])
def test_openais_forms(server, path):
    whole = parts([server.post(path, **ASKED[path]).json])
    *events, done = server.post(path, **ASKED[path], stream=True).events
    assert done == "[DONE]"
    assert parts(events) == whole
    assert all(len(ids) == 60 for _, ids, _ in whole.values())
    assert all(rows for _, _, rows in whole.values()) == (path != "/v1/fim/completions")
    if server.interval_s == 3600:  # the first tokens, the others, and of a chat role and reason
        assert len(events) <= 4 * len(whole)


@pytest.mark.parametrize("path", ["/completion", "/infill"])
def test_llama_cpps_forms(server, path):
    whole = server.post(path, **ASKED[path]).json
    *events, last = server.post(path, **ASKED[path], stream=True).events
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [i for event in (*events, last) for i in event["tokens"]] == whole["tokens"]
    rows = [row for event in (*events, last) for row in event["completion_probabilities"]]
    assert rows == whole["completion_probabilities"]
    assert len(whole["tokens"]) == 60
    assert bool(rows) == (path == "/completion")
    if server.interval_s == 3600:
        assert len(events) <= 2
