"""What answers while a model is being loaded: 503, to every request, as llama.cpp's server does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import msgspec

from codellama_rt.serve.errors import ApiError

_RETRY_S = 5
_HEAD_S = 10.0  # for which a client may take to send a request's head
_LINGER_S = 2.0  # for which the rest of a request is taken, so that the client reads the answer
_MAX_HEAD_BYTES = 2**16


@contextlib.contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """Answer 503 at an address, in a thread, until the end of the `with` block.

    Connections that are not yet accepted then stay with the socket, for the server that follows.

    Args:
        listener: listens; it stays open.
    """
    loop, end = asyncio.new_event_loop(), asyncio.Event()
    serving = _serve(listener.dup(), end)
    thread = threading.Thread(target=loop.run_until_complete, args=(serving,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


async def _serve(listener: socket.socket, end: asyncio.Event) -> None:
    server = await asyncio.start_server(_answer, sock=listener, limit=_MAX_HEAD_BYTES)
    await end.wait()
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(*_ENDS):
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_S)
        writer.write(_ANSWER)
        writer.write_eof()
        await asyncio.wait_for(_drop(reader), _LINGER_S)


async def _drop(reader: asyncio.StreamReader) -> None:
    while await reader.read(_MAX_HEAD_BYTES):
        pass


_ENDS = (
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
    asyncio.TimeoutError,
    TimeoutError,
    OSError,
)


def _answer_bytes() -> bytes:
    body = msgspec.json.encode(ApiError(503, "Loading model").body)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Retry-After: {_RETRY_S}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


_ANSWER = _answer_bytes()
