"""Server-sent events: headers at once, comments while nothing comes, an end that can be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import msgspec

from codellama_rt.serve.errors import ApiError, ClientLeftError, api_error
from codellama_rt.serve.generation import Gained, Generation

KEEP_ALIVE = b": keep-alive\n\n"
PROGRESS_S = 1.0
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]
_encode = msgspec.json.Encoder().encode


class Writer(Protocol):
    """The form of an endpoint's events."""

    def chunks(self, gained: Gained) -> list[Any]:
        """Return the events of what samples gained, as values for JSON; possibly none."""

    def last(self) -> list[Any]:
        """Return the events after the last one of each sample."""

    def progress(self) -> Any:
        """Return an event that says how far the prompt is, or None once it is computed."""


def event(value: Any) -> bytes:
    """Return a value as an event, in one line without spaces."""
    return b"data: " + _encode(value) + b"\n\n"


class EventStream:
    """The answer to a request for a stream: an ASGI application.

    Args:
        generation: whose outputs these are; it is aborted when the client leaves.
        writer: makes events of them.
        keep_alive_s: after so many seconds without an event comes a comment.
        ending: the bytes after the last event.
        with_progress: tell each second how far the prompt is, instead of the comment.
        on_error: makes an event of an error.
    """

    def __init__(
        self,
        generation: Generation,
        writer: Writer,
        keep_alive_s: float,
        *,
        ending: bytes = DONE,
        with_progress: bool = False,
        on_error: Callable[[ApiError], Any] | None = None,
    ) -> None:
        self._generation, self._writer = generation, writer
        self._silence_s = PROGRESS_S if with_progress else keep_alive_s
        self._ending, self._with_progress = ending, with_progress
        self._on_error = on_error or (lambda error: error.body)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        async with self._generation.watching(receive):
            try:
                start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                await send(start)
                await self._send_events(send)
            except ClientLeftError:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Any) -> None:
        sent = perf_counter()
        try:
            while not self._generation.has_ended:
                gained = await self._generation.take(self._silence_s)
                events = [event(chunk) for chunk in self._writer.chunks(gained)]
                if not events and perf_counter() - sent >= self._silence_s:
                    events = [self._sign_of_life()]
                if events:
                    await _send(send, b"".join(events))
                    sent = perf_counter()
            await _send(send, b"".join(map(event, self._writer.last())) + self._ending)
        except (ClientLeftError, asyncio.CancelledError):
            raise
        except Exception as error:  # the head is sent: an event is left to say it
            await _send(send, event(self._on_error(api_error(error))) + self._ending)

    def _sign_of_life(self) -> bytes:
        if self._generation.has_ended:
            return b""
        told = self._writer.progress() if self._with_progress else None
        return KEEP_ALIVE if told is None else event(told)


async def _send(send: Any, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
