"""What no client should send, thousands of times: nothing breaks, and /health answers."""

import contextlib
import json
import random
import socket
import threading
import time

import pytest
from helpers.served import request_bytes, serving

from codellama_rt import LLM

NUM_REQUESTS = 5000
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/fim/completions", "/infill"),
    *("/completion", "/tokenize", "/detokenize", "/nowhere"),
)
VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0, 1e-320),
    *("", "\x00", "\U0001f600", "<PRE> <SUF> <MID>", "<FILL_ME>", "a" * 300),
    *([], [[]], [[[]]], {}, {"a": {}}, [None], ["a", 1], [2**40], [-1], ["\x00"] * 20),
)
FIELDS = (
    *("prompt", "suffix", "messages", "input_prefix", "input_suffix", "input_extra", "tokens"),
    *("max_tokens", "n_predict", "n", "best_of", "temperature", "top_p", "top_k", "seed", "stop"),
    *("logit_bias", "logprobs", "echo", "stream", "stream_options", "response_format", "model"),
    *("structured_outputs", "stop_token_ids", "allowed_token_ids", "bad_words", "priority", "user"),
    *("truncate_prompt_tokens", "prompt_logprobs", "tools", "tool_choice", "top_logprobs"),
    *("samplers", "response_fields", "n_indent", "t_max_predict_ms", "n_probs", "grammar"),
    *("json_schema", "request_id", "content", "min_tokens", "repetition_penalty"),
)
RAW = (
    b"\x00" * 100,
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n"
    b"Content-Type: application/json\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 5\r\n\r\nzz\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%00%ff%0d%0a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/" + b"%2e%2e%2f" * 50 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
BODIES = (
    b"",
    b"{",
    b"null",
    b'{"prompt":"\xff\xfe"}',
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"a","temperature":NaN}',
    b'{"prompt":"a","temperature":1e999}',
    b'{"prompt":' + b"[" * 20000,
    b'{"prompt":"a","x":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b'{"prompt":"a","prompt":{"b":1}}',
    b'\xef\xbb\xbf{"prompt":"a"}',
    b'{"messages":[{"role":"user","content":"' + b"\\u0000" * 100 + b'"}]}',
    json.dumps({"prompt": "a", "structured_outputs": {"regex": "(a{1,500}){1,500}"}}).encode(),
    json.dumps({"prompt": "a", "structured_outputs": {"grammar": "root ::= root"}}).encode(),
    json.dumps({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"$ref": "#"}}}}).encode(),
)  # fmt: skip


def some_body(rng):
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(BODIES)
    if kind < 0.4:
        good = json.dumps({"prompt": "def f(", "max_tokens": 3}).encode()
        at = rng.randrange(len(good))
        return good[:at] + bytes([rng.randrange(256)]) + good[at + 1 :]
    fields = {name: rng.choice(VALUES) for name in rng.sample(FIELDS, rng.randrange(1, 6))}
    base = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    return json.dumps({**base, "n_predict": 2, **fields}).encode()


def some_request(rng):
    if rng.random() < 0.2:
        return rng.choice(RAW)
    body = some_body(rng)
    head = (
        f"{rng.choice(('POST', 'POST', 'POST', 'PUT', 'GET'))} {rng.choice(PATHS)} HTTP/1.1\r\n"
        f"Host: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def send(address, sent, how):
    """Send; cut it, close one half, or leave at once, as `how` says; return the status or 0."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=60) as connection:
        connection.settimeout(60)
        if how < 0.1:
            connection.sendall(sent[: len(sent) // 2])
            return 0
        connection.sendall(sent)
        if how < 0.2:
            return 0
        if how < 0.4:
            connection.shutdown(socket.SHUT_WR)
        elif not sent.endswith(b"}") and how < 0.9:
            connection.settimeout(0.05)
        head = connection.recv(64)
        return int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0
    return 0


class Health:
    """Ask for /health all the time, in a thread, and keep how long each answer took."""

    def __init__(self, server):
        self._server, self.seconds, self.statuses = server, [], set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        is_over = False
        while not is_over:  # once at least, and once when all is done
            is_over = self._over.wait(0.01)
            started = time.perf_counter()
            self.statuses.add(self._server.get("/health").status)
            self.seconds.append(time.perf_counter() - started)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()


def test_thousands_of_hostile_requests(open_llm):
    statuses = {}
    with open_llm() as llm, serving(llm, max_body_bytes=2**18) as server, Health(server) as health:

        def attack(seed):
            rng = random.Random(seed)
            for _ in range(NUM_REQUESTS // 8):
                sent = some_request(rng)
                status = send(server.address, sent, rng.random())
                statuses.setdefault(status, []).append(sent)

        threads = [threading.Thread(target=attack, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.wait_until_idle()
        assert server.post("/v1/completions", prompt="a", max_tokens=2).status == 200
    failed = {s: found[:2] for s, found in statuses.items() if s >= 500 and s not in (501, 503)}
    assert not failed
    assert {200, 400, 404, 405} <= statuses.keys()
    assert health.statuses == {200}
    tell("hostile", health)


def test_health_during_a_long_prompt(folder):
    """16k tokens in one step, which takes seconds."""
    sizes = {"max_num_batched_tokens": 16384, "kv_memory": "16MB", "max_step_seconds": None}
    with LLM(folder, max_model_len=16384, **sizes) as llm, serving(llm) as server:
        fields = {"prompt": [5] * 16380, "max_tokens": 2}
        with server.connect() as connection, Health(server) as health:
            connection.settimeout(600)  # seconds of computing are minutes on a busy machine
            connection.sendall(request_bytes("/v1/completions", fields))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert health.statuses == {200}
    tell("16k prefill", health)


def test_a_body_of_a_hundred_megabytes(served):
    with served.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 104857600\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            connection.settimeout(10)
            for _ in range(100):
                connection.sendall(b" " * 2**20)
    assert served.get("/health").status == 200


@pytest.mark.parametrize("count", [200])
def test_slow_clients_hold_up_nobody(served, count):
    """Heads and bodies that come a byte at a time."""
    whole = request_bytes("/v1/completions", {"prompt": "a", "max_tokens": 1})
    slow = [served.connect() for _ in range(count)]
    with Health(served) as health:
        for step in range(3):
            for i, connection in enumerate(slow):
                connection.sendall(whole[step : step + 1] if i % 2 else whole[:-5][step:1000])
    for connection in slow:
        connection.close()
    assert health.statuses == {200}
    served.wait_until_idle()


def tell(what, health):
    """Say how long /health took; a busy machine fails no test."""
    seconds = sorted(health.seconds)
    print(f"{what}: /health {len(seconds)} times, {1e3 * seconds[len(seconds) // 2]:.1f} ms "
          f"(median), {1e3 * seconds[-1]:.1f} ms (longest)")  # fmt: skip
    assert seconds[-1] < 60
