"""What takes long is not done in the event loop, which answers /health meanwhile."""

import threading

import pytest
from helpers.served import serving

from codellama_rt.serve import tokens
from codellama_rt.serve.completion_form import CompletionForm

LONG, SHORT = 1000, 20  # tokens with log-probabilities


@pytest.fixture
def where(open_llm, monkeypatch):
    """A server, and whether each answer was written in its event loop."""
    found = []
    loop_threads = set()

    def watch(owner, name):
        work = getattr(owner, name)

        def watched(*args):
            found.append(threading.get_ident() in loop_threads)
            return work(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(CompletionForm, "whole")
    watch(CompletionForm, "chunks")
    watch(tokens, "_tokenized")
    before = set(threading.enumerate())
    with open_llm() as llm, serving(llm, stream_interval_s=3600) as server:
        loop_threads |= {thread.ident for thread in set(threading.enumerate()) - before}
        yield server, found


@pytest.mark.parametrize("length", [LONG, SHORT])
def test_answers(where, length):
    server, found = where
    fields = {"prompt": [5] * length, "max_tokens": 1, "echo": True, "logprobs": 1}
    whole = server.post("/v1/completions", **fields).json
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == length + 1
    events = server.post("/v1/completions", **fields, stream=True).events
    assert len(events[0]["choices"][0]["logprobs"]["tokens"]) == length + 1
    assert found == [length == SHORT] * 2


@pytest.mark.parametrize("length", [20_000, 20])
def test_tokenize(where, length):
    server, found = where
    answer = server.post("/tokenize", prompt="a" * length, return_token_strs=True)
    assert answer.status == 200
    assert found == [length == 20]
