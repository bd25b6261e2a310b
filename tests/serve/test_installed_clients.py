"""Clients too heavy to be installed with the tests: `.ci/clients DIR` installs and runs them.

Each has an environment of its own, below the folder that CODELLAMA_RT_CLIENTS names. A script runs
there, is given the server's address, and prints what it got as JSON.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.served import record_prompts, serving

from codellama_rt import SamplingParams
from codellama_rt.tools.evaluation.perplexity import evaluate_perplexity

_CLIENTS = os.environ.get("CODELLAMA_RT_CLIENTS")
_LIMIT_S = 600
TEXT = "def f(x):\n    return x + 1\n\n\nprint(f(2))\n" * 12
MESSAGES = [{"role": "user", "content": "Reverse a list."}]


@pytest.fixture
def run_in(tmp_path):
    """Run a command of a client's environment; its standard output."""

    def run(client, *command, **variables):
        if _CLIENTS is None:
            pytest.skip("no heavy clients: .ci/clients DIR installs them and runs these tests")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        program, *arguments = command
        done = subprocess.run(
            [str(Path(_CLIENTS, client, "bin", program)), *map(str, arguments)],
            env=kept | variables,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def results_of(run_in, served):
    """Run a script in a client's environment; its `results`."""

    def run(client, script):
        head = f"import json\nurl, text = {served.url + '/v1'!r}, {TEXT!r}\n"
        output = run_in(client, "python", "-c", f"{head}{script}\nprint(json.dumps(results))")
        return json.loads(output.splitlines()[-1])

    return run


LM_EVAL = """
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

lm = LocalCompletionsAPI(
    base_url=f"{url}/completions", model="codellama", tokenizer_backend="remote", max_length=2000
)

def ask(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

results = {
    "text": lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)]),
    "ending": lm.loglikelihood([ask("loglikelihood", "def f(x):", " return x")]),
    "likeliest": lm.loglikelihood([ask("loglikelihood", "def f(", LIKELIEST)]),
    "generated": lm.generate_until(
        [ask("generate_until", "def f(", {"until": ["\\n\\n"], "max_gen_toks": 9})]
    ),
}
"""


def test_lm_eval(results_of, llm, tmp_path):
    """Its scores are those of `eval perplexity`, and of the model's logits."""
    tokenizer = llm.tokenizer
    ids = tokenizer.encode_plain("def f(")
    likeliest = llm.generate([ids], SamplingParams(max_tokens=1)).pop()
    results = results_of("lm-eval", LM_EVAL.replace("LIKELIEST", repr(likeliest.text)))
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    scores = evaluate_perplexity(llm, [file])["scores"]
    num_tokens = len(tokenizer.encode(TEXT)) - 1
    expected = -num_tokens * math.log(scores["perplexity"])
    assert results["text"] == pytest.approx([expected], rel=1e-6)
    # lm-eval encodes the whole, and takes from it what comes behind the context's tokens
    context, whole = (tokenizer.encode_plain(text) for text in ("def f(x):", "def f(x): return x"))
    [[logprob, is_greedy]] = results["ending"]
    assert logprob == pytest.approx(logprob_of(llm, whole, len(context)), rel=1e-6)
    assert is_greedy is False
    params = SamplingParams(max_tokens=9)
    assert results["generated"] == [llm.generate([ids], params).pop().text]
    [[_, is_greedy]] = results["likeliest"]
    assert is_greedy is True


def logprob_of(llm, ids, start):
    """The log-probability of the tokens from `start` on, by the model's logits."""
    logits = llm.logits(ids).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return sum(logits[i - 1, ids[i]] for i in range(start, len(ids)))


LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAI

common = {"base_url": url, "api_key": "x", "model": "codellama", "temperature": 0}
model, chat = OpenAI(**common, max_tokens=9), ChatOpenAI(**common, max_tokens=9)
schema = {"title": "a", "type": "object", "properties": {"a": {"type": "boolean"}},
          "required": ["a"], "additionalProperties": False}
answer = chat.invoke("Reverse a list.")
results = {
    "completion": [model.invoke("def f("), "".join(model.stream("def f("))],
    "chat": [answer.content, "".join(part.content for part in chat.stream("Reverse a list."))],
    "tokens": answer.usage_metadata["output_tokens"],
    "forms": [
        ChatOpenAI(**common).with_structured_output(schema, method=method).invoke("x")
        for method in ("json_schema", "function_calling")
    ],
}
"""


def test_langchain_openai(results_of, llm):
    results = results_of("langchain-openai", LANGCHAIN)
    assert results["completion"] == 2 * [completion_of(llm)]
    assert results["chat"] == 2 * [chat_of(llm)]
    assert results["tokens"] == 9
    for form in results["forms"]:
        assert form.keys() == {"a"}


LITELLM = """
import litellm

server = {"api_base": url, "api_key": "x", "max_tokens": 9, "temperature": 0, "max_retries": 0}
base, chat = "text-completion-openai/codellama", "openai/codellama"
messages = [{"role": "user", "content": "Reverse a list."}]
filled = litellm.text_completion("def f(", base, suffix="): pass", top_k=3, **server)
whole = litellm.completion(chat, messages, **server)
parts = litellm.completion(chat, messages, stream=True, **server)
try:
    litellm.completion("openai/gpt-4", messages, **server)
except litellm.exceptions.NotFoundError as error:
    refused = str(error)
results = {
    "filled": filled.choices[0].text,
    "chat": [
        whole.choices[0].message.content,
        "".join(part.choices[0].delta.content or "" for part in parts),
    ],
    "refused": refused,
}
"""


def test_litellm(results_of, llm):
    results = results_of("litellm", LITELLM)
    assert results["filled"] == llm.infill("def f(", "): pass", SamplingParams(max_tokens=9)).text
    assert results["chat"] == 2 * [chat_of(llm)]
    assert "gpt-4" in results["refused"]


def test_aider(run_in, open_llm, tmp_path, monkeypatch):
    """A tiny model writes nothing that could be applied, but aider shows all of it."""
    with open_llm(max_model_len=4000) as llm, serving(llm, names=("codellama",)) as server:
        prompts = record_prompts(server, monkeypatch)
        output = run_aider(run_in, server, tmp_path)
    with open_llm(max_model_len=4000) as llm:
        [prompt] = prompts
        assert "Write the body of add." in llm.tokenizer.decode(prompt)
        text = llm.generate([prompt], SamplingParams(max_tokens=64)).pop().text
    longest = max((part for part in text.split() if part.isascii()), key=len)
    assert longest in output
    assert "Model: openai/codellama" in output


def run_aider(run_in, server, tmp_path):
    (tmp_path / "add.py").write_text("def add(a, b):\n    pass\n")
    metadata = {"max_input_tokens": 4000, "max_tokens": 64, "litellm_provider": "openai"}
    (tmp_path / ".aider.model.metadata.json").write_text(json.dumps({"openai/codellama": metadata}))
    settings = {"name": "openai/codellama", "edit_format": "whole", "use_repo_map": False,
                "extra_params": {"max_tokens": 64}}  # fmt: skip
    (tmp_path / ".aider.model.settings.yml").write_text(json.dumps([settings]))
    options = "--no-git --yes-always --no-check-update --analytics-disable --no-pretty --no-stream"
    return run_in(
        "aider-chat",
        *("aider", "--model", "openai/codellama", "--message", "Write the body of add."),
        *("--no-show-model-warnings", "--no-fancy-input", *options.split(), "add.py"),
        OPENAI_API_BASE=f"{server.url}/v1",
        OPENAI_API_KEY="x",
    )


def test_guidellm(run_in, served, tmp_path):
    """A load of streams, whose tokens it counts by the usage in each event."""
    data, found = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    data.write_text("\n".join(json.dumps({"prompt": f"def f{i}(x):"}) for i in range(8)))
    backend = f"kind=openai_http,target={served.url},model=codellama"
    run_in(
        "guidellm",
        *("guidellm", "run", "--backend", f"{backend},request_format=/v1/completions"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={found}"),
        "--disable-progress",
        HF_HUB_OFFLINE="1",
    )
    [benchmark] = json.loads(found.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert requests["errored"] == []
    assert len(requests["successful"]) >= 6
    assert all(0 < one["output_tokens"] <= 16 for one in requests["successful"])


def completion_of(llm):
    return llm.generate("def f(", SamplingParams(max_tokens=9)).pop().text


def chat_of(llm):
    return llm.chat(MESSAGES, SamplingParams(max_tokens=9)).text
