"""Streams under load, clients that leave, and what remains of them: nothing."""

import asyncio
import json
import os
import random
import threading

import numpy as np
import pytest
from helpers.held_steps import holding
from helpers.served import WAIT_S, request_bytes, serving, unchunked, wait_for
from helpers.speculating import speculate_at_random

from codellama_rt import SamplingParams
from codellama_rt.serve import create_app
from codellama_rt.serve.generation import Generation

LONG = {"prompt": "def f(", "temperature": 0, "max_tokens": 1900, "ignore_eos": True}


async def exchange(address, sent, enough=None):
    """Send bytes, read the answer, or only so much of it, and close at once."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    found = b""
    while enough is None or len(found) < enough:
        part = await reader.read(4096)
        if not part:
            break
        found += part
    writer.transport.abort()
    return found


def texts_of(answer):
    """The texts of an answer by choice, streamed or whole, in any form, from its bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"text/event-stream" in head:
        lines = unchunked(body).decode().split("\n\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    else:
        events = [json.loads(body)]
    texts = {}
    for event in events:
        for choice in event.get("choices", [event]):
            message = choice.get("message") or choice.get("delta") or choice
            text = message.get("text") or message.get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


SHARED = "def add(first, second):\n    return first + second\n" * 3
PROMPTS = (SHARED + "class A", SHARED + "class B", "x = ", "for number in")


def sampled(i, **fields):
    return {"temperature": (i % 3) / 2, "seed": i, "top_p": 0.9, **fields}


def case(i, llm):
    """A request with parameters of its own, and the texts that the LLM itself has for it."""
    prompt, length = PROMPTS[i % len(PROMPTS)], 5 + i % 40
    params = SamplingParams(max_tokens=length, **sampled(i))
    form = i % 6
    if form < 2:
        fields = sampled(i, max_tokens=length, n=1 + i % 3)
        texts = {one.index: one.text for one in llm.generate(prompt, SamplingParams(**fields))}
        return "/v1/completions", {"prompt": prompt, **fields}, texts
    if form == 2:
        messages = [{"role": "user", "content": prompt}]
        fields = {"messages": messages, **sampled(i, max_tokens=length)}
        return "/v1/chat/completions", fields, {0: llm.chat(messages, params).text}
    if form == 3:
        fields = {"prompt": prompt, **sampled(i, n_predict=length)}
        return "/completion", fields, {0: llm.generate(prompt, params)[0].text}
    texts = {0: llm.infill(prompt, "\n\nclass Z", params).text}
    if form == 4:
        fields = {"prompt": prompt, "suffix": "\n\nclass Z", **sampled(i, max_tokens=length)}
        return "/v1/fim/completions", fields, texts
    fields = {"input_prefix": prompt, "input_suffix": "\n\nclass Z"}
    return "/infill", {**fields, **sampled(i, n_predict=length)}, texts


@pytest.mark.parametrize("stream", [True, False])
def test_texts_under_load_are_those_of_the_llm(open_llm, llm, stream):
    """With shared prefixes, speculation, and so few blocks that sequences are preempted."""
    cases = [case(i, llm) for i in range(90)]
    sizes = {"kv_memory": 230_000, "block_size": 16, "max_model_len": 400, "max_num_seqs": 24}
    sizes["speculation"] = "suffix"
    with open_llm(**sizes) as tight, serving(tight) as server:
        speculate_at_random(tight.engine, np.random.default_rng(5))  # by no measured costs

        async def main():
            sent = [
                request_bytes(path, {**fields, "stream": stream}, headers="Connection: close\r\n")
                for path, fields, _ in cases
            ]
            with holding(tight.engine):  # until all have come
                tasks = [asyncio.create_task(exchange(server.address, one)) for one in sent]
                while server.service.engine.num_unfinished < len(cases):
                    await asyncio.sleep(0.005)
            return await asyncio.gather(*tasks)

        answers = asyncio.run(main())
        for i, (answer, (path, _, texts)) in enumerate(zip(answers, cases, strict=True)):
            assert texts_of(answer) == texts, (i, path)
        server.wait_until_idle()
        totals = tight.engine.stats()
        assert totals["draft_tokens"] > 0
        assert totals["prefix_hit_tokens"] > 0
        assert totals["preemptions"] > 0


def test_thousands_of_clients_that_leave(open_llm):
    """Streamed and unary, before the head, within, at random tokens; nothing remains of them."""
    num_clients, at_once = 2000, 40
    rng = random.Random(5)
    bodies = [
        request_bytes("/v1/completions", {**LONG, "stream": True, "n": 2}),
        request_bytes("/v1/completions", LONG),
        request_bytes("/infill", {"input_prefix": "a", "input_suffix": "b", "ignore_eos": True}),
        request_bytes("/completion", {"prompt": "a", "stream": True, "ignore_eos": True}),
        request_bytes(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "stream": True, "ignore_eos": True},
        ),
    ]
    with open_llm(max_num_seqs=16, block_size=16) as llm, serving(llm) as server:

        async def leave(i):
            body = bodies[i % len(bodies)]
            kind = rng.random()
            if kind < 0.2:
                await exchange(server.address, body[: rng.randrange(1, len(body))], 0)
                return
            task = asyncio.create_task(exchange(server.address, body, rng.randrange(1, 3000)))
            await asyncio.wait({task}, timeout=rng.random() * 0.05)
            task.cancel()

        async def main():
            waiting = iter(range(num_clients))

            async def client():
                for i in waiting:
                    await leave(i)

            await asyncio.gather(*(client() for _ in range(at_once)))

        asyncio.run(main())
        server.wait_until_idle()
        wait_for(lambda: not server.server.server_state.tasks)
        wait_for(lambda: not server.server.server_state.connections)
        assert server.post("/v1/completions", prompt="a", max_tokens=2).status == 200
        wait_for(lambda: num_open_sockets(server) == 0)


def num_open_sockets(server):
    return len(server.server.server_state.connections)


def test_file_descriptors_do_not_leak(open_llm):
    with open_llm() as llm, serving(llm) as server:

        async def main():
            sent = request_bytes("/v1/completions", {**LONG, "stream": True})
            await asyncio.gather(*(exchange(server.address, sent, 500) for _ in range(20)))

        asyncio.run(main())
        server.wait_until_idle()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            asyncio.run(main())
        server.wait_until_idle()
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_unary_request_ends_when_its_client_leaves(open_llm, monkeypatch):
    with open_llm() as llm, serving(llm) as server:
        engine, is_aborted = server.service.engine, threading.Event()
        abort = engine.abort
        monkeypatch.setattr(engine, "abort", lambda name: (abort(name), is_aborted.set()))
        with holding(llm.engine) as steps:
            with server.connect() as connection:
                connection.sendall(request_bytes("/v1/completions", LONG))
                steps.allow(5)
                wait_for(lambda: steps.num_made == 5)
            assert is_aborted.wait(WAIT_S)
        server.wait_until_idle()
        assert server.get("/metrics").body.count(b'finished_reason="abort"') == 1


def test_comments_while_nothing_comes(open_llm):
    """The head comes before the prompt is computed, and comments until it is."""
    sizes = {"max_model_len": 6000, "max_num_batched_tokens": 16}
    with open_llm(**sizes) as llm, serving(llm, keep_alive_s=0.02) as server:
        fields = {"prompt": [5] * 5000, "max_tokens": 2, "stream": True}
        sent = request_bytes("/v1/completions", fields, headers="Connection: close\r\n")
        with server.connect() as connection:
            with holding(llm.engine):
                connection.sendall(sent)
                found = connection.recv(4096)
                while found.count(b": keep-alive\n\n") < 2:
                    part = connection.recv(4096)
                    assert part, found
                    found += part
                assert found.startswith(b"HTTP/1.1 200")
                assert b"text/event-stream" in found
                assert b"data:" not in found
            while part := connection.recv(4096):
                found += part
        assert unchunked(found.partition(b"\r\n\r\n")[2]).endswith(b"data: [DONE]\n\n")


def test_an_error_in_a_stream(open_llm, monkeypatch):
    """The head is sent: an event says it, and the stream ends as others do."""
    with open_llm() as llm, serving(llm) as server:

        async def fail(self, seconds=None):
            raise ZeroDivisionError

        monkeypatch.setattr(Generation, "take", fail)
        for path, end in (("/v1/completions", ["[DONE]"]), ("/completion", [])):
            [event, *rest] = server.post(path, prompt="a", stream=True).events
            assert event["error"]["message"] == "the server failed; its log says why"
            assert rest == end
        assert server.post("/v1/completions", prompt="a").status == 500
        monkeypatch.undo()
        server.wait_until_idle()


def test_the_end_of_the_server_ends_streams(open_llm):
    """Within the time to drain they go on; then they end with what they have."""
    with open_llm() as llm:
        with serving(llm, drain_timeout_s=0.3) as server:
            connection = server.connect()
            fields = {**LONG, "n": 64, "stream": True}
            connection.sendall(request_bytes("/v1/completions", fields))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        found = b""
        while part := connection.recv(65536):
            found += part
        connection.close()
        assert b'"finish_reason":"abort"' in found or b'"finish_reason":"length"' in found
        assert found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_an_application_for_another_server(llm):
    """`create_app` takes an engine, too, and needs nothing of uvicorn."""
    app = create_app(llm.engine)
    sent, inbox = [], asyncio.Queue()

    async def main():
        await inbox.put({"type": "http.request", "body": b'{"prompt":"a","max_tokens":2}'})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }

        async def send(message):
            sent.append(message)

        await app(scope, inbox.get, send)
        await app.service.close()

    asyncio.run(main())
    assert sent[0]["status"] == 200
    assert b'"model":"model"' in sent[1]["body"]
