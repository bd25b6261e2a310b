"""While a model is being loaded every request gets 503; then the same address serves."""

import contextlib
import http.client
import json
import socket

import pytest
from helpers.served import JSON, WAIT_S, request_bytes

from codellama_rt.cli import main as cli
from codellama_rt.cli import run
from codellama_rt.serve import loading
from codellama_rt.serve import server as servers
from codellama_rt.serve.server import listen


@pytest.fixture
def address(monkeypatch):
    for name in ("_HEAD_S", "_LINGER_S"):  # enough for a busy machine
        monkeypatch.setattr(loading, name, WAIT_S)
    with listen("127.0.0.1", 0) as listener, loading.answering(listener):
        yield listener.getsockname()


def ask(address, method, path, body=None):
    connection = http.client.HTTPConnection(*address, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, JSON)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", None),
        ("GET", "/v1/models", None),
        ("GET", "/", None),
        ("POST", "/v1/completions", b'{"prompt": "a"}'),
        ("POST", "/infill", b'{"input_prefix": "' + b"a" * 2_000_000 + b'"}'),
    ],
)
def test_every_request_gets_503(address, method, path, body):
    status, headers, answer = ask(address, method, path, body)
    assert status == 503
    assert int(headers["Retry-After"]) >= 1
    assert headers["Connection"] == "close"
    # as llama.cpp's server has it, on which its editors' plugins wait
    assert json.loads(answer)["error"] == {
        "message": "Loading model",
        "type": "unavailable_error",
        "param": None,
        "code": 503,
    }


def test_clients_that_send_no_head_hold_up_nobody(address):
    with contextlib.ExitStack() as connections:
        for sent in (b"", b"GET / HT", b"\r\n\r\n", b"a" * 100_000, b"\x00\xff\r\n\r\n"):
            silent = connections.enter_context(socket.create_connection(address, timeout=WAIT_S))
            silent.sendall(sent)
        assert ask(address, "GET", "/health")[0] == 503


def test_a_silent_client_is_left(address, monkeypatch):
    monkeypatch.setattr(loading, "_HEAD_S", 0.01)
    with socket.create_connection(address, timeout=WAIT_S) as silent:
        assert silent.recv(1) == b""


def test_connections_wait_for_the_server_that_follows():
    with listen("127.0.0.1", 0) as listener:
        with loading.answering(listener):
            pass
        with socket.create_connection(listener.getsockname(), timeout=WAIT_S) as client:
            client.sendall(request_bytes("/health", None))
            taken, _ = listener.accept()
            with taken:
                assert taken.recv(4) == b"POST"


def test_the_command_listens_before_it_loads(folder, monkeypatch):
    """It answers 503 while it opens the model, and serves it at the same address."""
    listeners, told, open_model = [], [], run.open_model

    def listen_anywhere(host, port):
        listeners.append(listen(host, 0))
        return listeners[0]

    def open_and_ask(options):
        told.append(ask(listeners[0].getsockname(), "GET", "/health")[0])
        return open_model(options)

    def serve(model, settings, listener, *, drain_timeout_s):
        told.append((model.config.n_layers > 0, settings.names, listener is listeners[0]))

    monkeypatch.setattr(servers, "listen", listen_anywhere)
    monkeypatch.setattr(servers, "serve", serve)
    monkeypatch.setattr(run, "open_model", open_and_ask)
    options = ["--kv-memory", "4MB", "--served-model-name", "codellama"]
    cli.app(["serve", str(folder), *options], prog_name="codellama-rt", standalone_mode=False)
    assert told == [503, (True, ("codellama",), True)]
    assert listeners[0].fileno() == -1
