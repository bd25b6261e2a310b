"""llama.cpp's endpoints: the answers that its editors' plugins read."""

import pytest
from helpers.held_steps import holding
from helpers.served import Answer, request_bytes, serving, unchunked

from codellama_rt import SamplingParams
from codellama_rt.serve import event_stream
from codellama_rt.serve.line_rules import LineRules

PROMPT = "def add(first, second):"


def test_the_answer_to_llama_vim(served):
    """It looks for `"content":"` before it parses, and wants all in one line."""
    fields = ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached"]
    answer = served.post(
        "/infill",
        input_prefix="def f(\n",
        input_suffix=")\n",
        input_extra=[{"text": "import os", "filename": "a.py", "time": [12, 345]}],
        prompt="    x",
        n_predict=16,
        n_indent=4,
        top_k=40,
        top_p=0.9,
        samplers=["top_k", "top_p", "infill"],
        stop=[],
        stream=False,
        cache_prompt=True,
        id_slot=0,
        t_max_prompt_ms=500,
        t_max_predict_ms=1000,
        response_fields=fields,
        model="",
    )
    assert answer.status == 200
    assert b'"content":"' in answer.body
    assert b"\n" not in answer.body
    assert list(answer.json) == fields


def test_the_warm_up_of_llama_vim(served):
    """It fills the cache, and the request that follows finds the prefix there."""
    extra = [{"text": "line = 1\n" * 60, "filename": "b.py"}]
    warm = {"input_extra": extra, "input_prefix": "", "input_suffix": "", "samplers": []}
    answer = served.post("/infill", **warm, n_predict=0, t_max_predict_ms=1, response_fields=[""])
    assert answer.json == {}
    body = {"input_extra": extra, "input_prefix": "x", "input_suffix": "y", "n_predict": 1}
    found = served.post("/infill", **body).json
    assert found["timings"]["prompt_n"] < found["tokens_evaluated"]


def test_completion(served, llm):
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=9, logprobs=2))[0]
    whole = served.post("/completion", prompt=PROMPT, n_predict=9, temperature=0).json
    assert whole["content"] == expected.text
    assert (whole["stop"], whole["stop_type"], whole["tokens_predicted"]) == (True, "limit", 9)
    assert whole["generation_settings"]["n_ctx"] == 2048
    assert whole["timings"].keys() == {
        *("prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"),
        *("predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"),
    }
    body = {"prompt": PROMPT, "n_predict": 9, "temperature": 0}
    *events, last = served.post("/completion", **body, n_probs=2, stream=True).events
    assert "".join(event["content"] for event in events) == expected.text
    assert not any(event["stop"] for event in events)
    assert (last["stop"], last["content"]) == (True, "")
    every = [*events, last]  # as llama.cpp's events, each one has the tokens of its text
    assert [i for event in every for i in event["tokens"]] == expected.token_ids
    rows = [row for event in every for row in event["completion_probabilities"]]
    assert [row["id"] for row in rows] == expected.token_ids


def test_how_a_completion_ends(served):
    text = served.post("/completion", prompt=PROMPT, n_predict=20, temperature=0).json["content"]
    word = next(c for c in text[3:] if c.isascii())
    answer = served.post(
        "/completion", prompt=PROMPT, n_predict=20, temperature=0, stop=[word]
    ).json
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", word)
    assert answer["content"] == text[: text.index(word)]
    ended = served.post("/completion", prompt=PROMPT, temperature=0, logit_bias=[[2, 100]]).json
    assert ended["stop_type"] == "eos"
    banned = served.post(
        "/completion", prompt=PROMPT, n_predict=9, temperature=0, logit_bias=[[2, False]]
    )
    assert banned.status == 200


def test_what_completion_refuses(served):
    for name, fields in (
        ("prompt", {"prompt": ["a", "b"]}),
        ("logit_bias", {"prompt": "a", "logit_bias": [[1]]}),
        ("n_predict", {"prompt": "a", "n_predict": "x"}),
    ):
        answer = served.post("/completion", **fields)
        assert answer.status == 400
        assert answer.json["error"]["param"] == name


def test_props(served):
    found = served.get("/props").json
    assert found["default_generation_settings"]["n_ctx"] == 2048
    assert found["total_slots"] == 64


def test_tokens(served, llm):
    text = "def f(x):\n    return 'é' \U0001f600"
    ids = llm.tokenizer.encode(text)
    found = served.post("/tokenize", prompt=text, return_token_strs=True).json
    assert found["tokens"] == ids
    assert (found["count"], len(found["token_strs"])) == (len(ids), len(ids))
    assert served.post("/tokenize", prompt=text, add_special_tokens=False).json["tokens"] == ids[1:]
    assert served.post("/tokenize", content=text).json == {"tokens": ids[1:]}
    pieces = served.post("/tokenize", content="def", with_pieces=True).json["tokens"]
    assert pieces[0].keys() == {"id", "piece"}
    for name, token_id in (("<s>", 1), ("</s>", 2)):
        fields = {"prompt": name, "add_special_tokens": False}
        assert served.post("/tokenize", **fields).json["tokens"] == [token_id]
    assert served.post("/detokenize", tokens=ids[1:]).json["prompt"] == text
    chat = served.post("/tokenize", messages=[{"role": "user", "content": "a"}])
    assert chat.json["count"] > 4
    info = served.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert served.post("/tokenize").status == 400
    assert served.post("/detokenize", tokens=[10**6]).json["error"]["param"] == "tokens"


@pytest.mark.parametrize(
    ("indent", "pieces", "expected"),
    [
        (0, ["a\nb", "\nc"], "a\nb\nc"),
        (4, ["x = 1\n    y\nz"], "x = 1\n    y"),
        (4, ["x\n", "  ", "  y", "\n", "  z"], "x\n    y"),
        (2, ["x\n\n\n  y\n\n"], "x\n\n\n  y\n\n"),
        (2, ["x\n", " "], "x\n "),
        (1, ["x\n\ty\nz"], "x\n\ty"),
    ],
)
def test_a_filling_ends_at_a_line_that_is_indented_less(indent, pieces, expected):
    rules, text = LineRules(indent), ""
    for piece in pieces:
        shown, ends = rules.take(piece)
        text += shown
        if ends:
            break
    else:
        text += rules.flush()
    assert text == expected


def test_a_filling_ends_at_a_line_after_some_time():
    rules = LineRules(0, 1e-6)
    assert rules.take("a") == ("a", False)
    assert rules.take("b\nc\nd") == ("b", True)


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_progress_of_a_prompt(open_llm, path):
    with (
        open_llm(max_model_len=4000, max_num_batched_tokens=16) as llm,
        serving(llm) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(event_stream, "PROGRESS_S", 0.01)
        body = {"prompt": "a" * 3900, "messages": [{"role": "user", "content": "a" * 3900}]}
        limits = {"n_predict": 2, "max_tokens": 2}
        fields = {**body, **limits, "stream": True, "return_progress": True}
        found = b""
        with server.connect() as connection:
            with holding(llm.engine) as steps:
                connection.sendall(request_bytes(path, fields, headers="Connection: close\r\n"))
                steps.allow(5)
                while b"prompt_progress" not in found:
                    part = connection.recv(4096)
                    assert part, found
                    found += part
            while part := connection.recv(4096):
                found += part
    answer = Answer(200, {}, unchunked(found.partition(b"\r\n\r\n")[2]))
    events = [event for event in answer.events if event != "[DONE]"]
    found = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert found
    assert len({one["total"] for one in found}) == 1
    for name in ("processed", "time_ms"):
        assert [one[name] for one in found] == sorted(one[name] for one in found)
    assert found[0]["processed"] < found[0]["total"]
    assert not any(event.get("choices") for event in events if "prompt_progress" in event)
    assert events[-1].get("stop") or events[-1]["choices"][0]["finish_reason"] == "length"
