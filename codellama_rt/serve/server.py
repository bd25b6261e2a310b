"""uvicorn with h11, and what it lacks: limits of time, and streams that end at the end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from codellama_rt.engine.engine import Engine
from codellama_rt.llm.llm import LLM
from codellama_rt.serve.app import create_app
from codellama_rt.serve.settings import Settings

MAX_HEADER_BYTES = 2**16


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose client neither sends a head nor reads an answer.

    Attributes:
        head_timeout_s: from the connection, or the first byte of a later head, to its end.
        read_timeout_s: for which a client may leave a full buffer unread.
    """

    head_timeout_s = 20.0
    read_timeout_s = 60.0

    def connection_made(self, transport: Any) -> None:
        """Expect a head."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._end)
        self._read_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Take data; a head that is not complete keeps its time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_timer.cancel()
        elif self._head_timer.cancelled() and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._head_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client whose buffer is full some time."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().resume_writing()

    def _end(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server; when it is told to end it finishes what runs, and then the rest."""

    def __init__(self, config: uvicorn.Config, app: Any, drain_timeout_s: float) -> None:
        """Take the application whose generations end after `drain_timeout_s`."""
        super().__init__(config)
        self._service, self._drain_timeout_s = app.service, drain_timeout_s

    async def shutdown(self, sockets: Any = None) -> None:
        """Refuse further requests, wait for those that run, then end them with what they have."""
        timer = asyncio.get_running_loop().call_later(self._drain_timeout_s, self._service.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve(
    model: LLM | Engine,
    settings: Settings,
    listener: socket.socket,
    *,
    drain_timeout_s: float = 60.0,
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        model: as for `create_app`.
        settings: as there.
        listener: of `listen`; it is closed at the end.
        drain_timeout_s: for requests under way at the end.
    """
    server = make_server(model, settings, *listener.getsockname()[:2], drain_timeout_s)
    asyncio.run(server.serve(sockets=[listener]))


def make_server(
    model: LLM | Engine, settings: Settings, host: str, port: int, drain_timeout_s: float = 60.0
) -> Server:
    """Return a server that has not been started.

    Args:
        model: as for `create_app`.
        settings: as there.
        host: address to listen at.
        port: 0: any that is free.
        drain_timeout_s: as for `serve`.
    """
    app = create_app(model, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=GuardedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=int(drain_timeout_s) + 10,
    )
    return Server(config, app, drain_timeout_s)


async def run(server: Server, on_start: Callable[[str], None] | None = None) -> None:
    """Run a server to its end.

    Args:
        server: of `make_server`.
        on_start: called with the server's address once it listens.

    Raises:
        OSError: the address is in use, or may not be used.
    """
    listener = listen(server.config.host, server.config.port)
    if on_start is not None:
        on_start(address_of(listener))
    await server.serve(sockets=[listener])


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a socket listens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; connections wait until a server takes it.

    Raises:
        OSError: the address is in use, or may not be used.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)
