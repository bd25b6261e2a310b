"""Keys, ids, origins, limits: what stands before every endpoint."""

import base64
import contextlib
import http.client
import socket
import time

import pytest
from helpers.held_steps import holding
from helpers.served import JSON, request_bytes, serving, wait_for

from codellama_rt.serve import server as server_module
from codellama_rt.serve.app import ROUTES

GREEDY = {"prompt": "def f(", "temperature": 0, "max_tokens": 4}
LONG = {"prompt": "def f(", "temperature": 0, "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def locked(open_llm):
    with open_llm() as llm, serving(llm, api_keys=("first", "second-é")) as server:
        yield server


@pytest.fixture(scope="module")
def limited(open_llm):
    """Small limits, and a queue of a hundred prompt tokens."""
    settings = {"max_body_bytes": 2000, "max_requests": 3}
    with open_llm(max_num_batched_tokens=16) as llm, serving(llm, **settings) as server:
        llm.engine.max_queued_tokens = 100
        yield server


PATHS = sorted({path.replace("{name:path}", "x") for _, paths, _ in ROUTES for path in paths})


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_every_path_but_health_needs_a_key(locked, path):
    is_open = path in ("/health", "/ping")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        for method in ("GET", "POST"):
            answer = locked.ask(method, path, headers=headers)
            assert (answer.status == 401) is not is_open, (method, path)
            if not is_open:
                assert answer.json["error"]["code"] == "invalid_api_key"
                assert "www-authenticate" in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first"},
        {"authorization": "bearer  first "},
        {"x-api-key": "first"},
        {"X-Api-Key": "first", "Authorization": "Bearer "},
        {"Authorization": "Basic " + base64.b64encode(b"me:first").decode()},
    ],
)
def test_ways_to_send_a_key(locked, headers):
    assert locked.ask("GET", "/v1/models", headers=headers).status == 200


def test_metrics_may_be_open(open_llm, locked):
    assert locked.get("/metrics").status == 401
    with open_llm() as llm, serving(llm, api_keys=("k",), open_metrics=True) as server:
        assert server.get("/metrics").status == 200
        assert server.get("/v1/models").status == 401


def test_an_empty_key_is_fine_where_none_is_needed(served):
    assert served.get("/v1/models", Authorization="Bearer ").status == 200


def test_request_ids(served):
    answer = served.ask("POST", "/v1/completions", GREEDY, {"X-Request-Id": "my-id.1"})
    assert answer.headers["x-request-id"] == "my-id.1"
    assert answer.json["id"] == "cmpl-my-id.1"
    own = served.post("/v1/completions", **GREEDY, request_id="of the body")
    assert own.json["id"] == "cmpl-of the body"
    for bad in ("x" * 129, "a b", "é"):
        given = served.get("/health", **{"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32


def test_origins(open_llm, served):
    page = {"Origin": "https://a.example"}
    answer = served.get("/v1/models", **page)
    assert "access-control-allow-origin" not in answer.headers
    assert served.ask("OPTIONS", "/v1/completions", headers=page).status == 405
    with open_llm() as llm, serving(llm, allowed_origins=("https://a.example",)) as server:
        allowed = server.get("/v1/models", **page)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        flight = server.ask("OPTIONS", "/v1/completions", headers=page)
        assert flight.status == 204
        assert "authorization" in flight.headers["access-control-allow-headers"]
        other = server.get("/v1/models", Origin="https://b.example")
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_other_content_types(served, content_type):
    """A page of another host could send these without asking the browser first."""
    answer = served.ask("POST", "/v1/completions", GREEDY, {"Content-Type": content_type})
    assert answer.status == 415


def test_paths_and_methods_that_are_not_there(served):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/health/", 404),
    ):
        answer = served.ask(method, path)
        assert answer.status == status
        assert answer.json["error"]["message"]


def test_bodies_that_are_too_large(limited):
    answer = limited.post("/v1/completions", prompt="x" * 3000)
    assert answer.status == 413
    with limited.connect() as connection:  # in chunks, without a length
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(open_llm):
    with (
        open_llm() as llm,
        serving(llm, body_timeout_s=0.3) as server,
        server.connect() as connection,
    ):
        connection.sendall(request_bytes("/v1/completions", GREEDY)[:-5])
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


BEGUN = [b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nA"]


@pytest.mark.parametrize("begin", [b"", *BEGUN])
def test_a_head_that_does_not_come(served, begin, monkeypatch):
    monkeypatch.setattr(server_module.GuardedProtocol, "head_timeout_s", 0.2)
    with served.connect() as connection:
        connection.sendall(begin)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


@pytest.mark.parametrize("begin", BEGUN)
def test_a_later_head_that_does_not_come(served, begin, monkeypatch):
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        found = b""
        while not found.endswith(b'{"status":"ok"}'):
            part = connection.recv(1000)
            assert part, "the connection was closed"
            found += part
        monkeypatch.setattr(server_module.GuardedProtocol, "head_timeout_s", 0.2)
        connection.sendall(begin)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


def test_a_header_that_is_too_large(served):
    closed = contextlib.suppress(ConnectionResetError, BrokenPipeError)
    with served.connect() as connection, closed:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 2**20)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert served.get("/health").status == 200


def test_a_full_queue(limited):
    """503 with the time that the backlog takes; the tokens of a prompt count until computed."""
    streams = [limited.connect() for _ in range(2)]
    with holding(limited.service.engine.engine):
        for stream in streams:
            stream.sendall(request_bytes("/v1/completions", {**LONG, "stream": True}))
            assert stream.recv(100).startswith(b"HTTP/1.1 200")
        answer = limited.post("/v1/completions", prompt=[5] * 101)
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "prompt tokens wait" in answer.json["error"]["message"]
        more = limited.post("/v1/completions", prompt=["a", "b"])  # than 3 requests
        assert more.status == 503
    for stream in streams:
        stream.close()
    limited.wait_until_idle()
    assert limited.post("/v1/completions", **GREEDY).status == 200
    text = limited.get("/metrics").body.decode()
    assert 'reason="tokens"} 1.0' in text
    assert 'reason="requests"} 1.0' in text


def test_a_reader_that_does_not_read(open_llm, monkeypatch):
    """Its connection ends, and with it its request; the others have not waited."""
    monkeypatch.setattr(server_module.GuardedProtocol, "read_timeout_s", 0.3)
    with open_llm() as llm, serving(llm) as server:
        stream = socket.socket()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.connect(server.address)
        fields = {**LONG, "n": 64, "stream": True, "return_token_ids": True, "logprobs": 20}
        stream.sendall(request_bytes("/v1/completions", fields))
        wait_for(lambda: not server.is_idle())
        assert server.post("/v1/completions", **GREEDY).status == 200
        server.wait_until_idle()
        stream.close()


def test_pipelined_requests(served):
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        found, end = b"", time.monotonic() + 30
        while found.count(b'{"status":"ok"}') < 3 and time.monotonic() < end:
            found += connection.recv(1000)
    assert found.count(b"HTTP/1.1 200") == 3


def test_head_requests(served):
    connection = http.client.HTTPConnection(*served.address)
    connection.request("HEAD", "/health", headers=JSON)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")


def test_the_log_has_no_prompts(served, caplog):
    with caplog.at_level("INFO", logger="codellama_rt.serve"):
        served.ask("POST", "/v1/completions?q=secret", {**GREEDY, "prompt": "secret"})
        served.ask("POST", "/v1/completions", {**GREEDY, "prompt": "secret", "n": "secret"})
    assert "POST /v1/completions 200" in caplog.text
    assert "secret" not in caplog.text
