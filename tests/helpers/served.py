"""A server of a tiny model in a thread of this process, and clients of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

for _name in ("starlette", "uvicorn", "h11", "msgspec", "prometheus_client"):
    pytest.importorskip(_name)  # a test module without them is skipped, and CI says so

from codellama_rt.serve import Settings  # noqa: E402
from codellama_rt.serve.server import Server, make_server, run  # noqa: E402

JSON = {"Content-Type": "application/json"}
WAIT_S = 60.0  # against hanging alone


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, "[DONE]" as text, comments left out."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        found = []
        for part in parts:
            assert "\n" not in part
            if not part.startswith(":"):
                text = part.removeprefix("data: ")
                assert text != part
                found.append(text if text == "[DONE]" else json.loads(text))
        return found


@dataclass
class Served:
    """A running server."""

    model: Any
    server: Server
    address: tuple[str, int]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def service(self) -> Any:
        return self.server._service

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT_S)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, sent, {**JSON, **(headers or {})})
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def post(self, path: str, **body: Any) -> Answer:
        return self.ask("POST", path, body)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=WAIT_S)

    def is_idle(self) -> bool:
        """Whether no request is left and no block is in use."""
        engine = self.service.engine.engine
        blocks = engine.scheduler.blocks
        has_work = self.service.engine.num_unfinished or engine.has_unfinished()
        return not has_work and blocks.num_free == blocks.num_blocks

    def wait_until_idle(self) -> None:
        wait_for(self.is_idle)


def wait_for(condition: Any, most_s: float = WAIT_S) -> None:
    """Wait until a condition holds, which it does soon or never."""
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def request_bytes(path: str, body: Any, *, headers: str = "") -> bytes:
    """A request as it is sent, to be cut or left unread."""
    sent = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(sent)}\r\n\r\n"
    )
    return head.encode() + sent


def unchunked(body: bytes) -> bytes:
    """Return what a body holds that came in chunks."""
    found = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        found += rest[:length]
        body = rest[length + 2 :]
    return found


@contextlib.contextmanager
def serving(model: Any, **settings: Any) -> Iterator[Served]:
    """Serve a model until the end of the `with` block."""
    drain = settings.pop("drain_timeout_s", 1.0)
    server = make_server(model, Settings(**settings), "127.0.0.1", 0, drain)
    addresses: list[str] = []
    thread = threading.Thread(target=lambda: asyncio.run(run(server, addresses.append)))
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        host, _, port = addresses[0].removeprefix("http://").rpartition(":")
        yield Served(model, server, (host, int(port)))
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def record_prompts(server, monkeypatch) -> list[list[int]]:
    """The token ids of each request that a server's engine gets from now on."""
    add_request, prompts = server.service.engine.add_request, []

    def record(token_ids, *args, **options):
        prompts.append(list(token_ids))
        return add_request(token_ids, *args, **options)

    monkeypatch.setattr(server.service.engine, "add_request", record)
    return prompts
