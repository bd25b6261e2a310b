"""Server-sent events: headers at once, comments while nothing comes, an end that can be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from codellama_rt.serve.errors import ApiError, ClientLeftError, api_error
from codellama_rt.serve.generation import Gained, Generation, size_of
from codellama_rt.serve.long_work import beside_loop

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
            silence = _Silence(self._silence_s, self._generation.interrupt)
            try:
                start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                await send(start)
                body = await self._send_events(send, silence)
                await send({"type": "http.response.body", "body": body, "more_body": False})
            except ClientLeftError:
                return
            finally:
                silence.end()

    async def _send_events(self, send: Any, silence: _Silence) -> bytes:
        """Send events as they come; return the last ones, so that the end is one write."""
        try:
            while True:
                gained = await self._generation.take()
                body = await beside_loop(size_of(gained), self._events, gained)
                if self._generation.has_ended:
                    return body + b"".join(map(event, self._writer.last())) + self._ending
                if not body and silence.has_lasted():
                    body = self._sign_of_life()
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    silence.restart()
        except (ClientLeftError, asyncio.CancelledError):
            raise
        except Exception as error:  # the head is sent: an event is left to say it
            return event(self._on_error(api_error(error))) + self._ending

    def _events(self, gained: Gained) -> bytes:
        return b"".join(map(event, self._writer.chunks(gained)))

    def _sign_of_life(self) -> bytes:
        told = self._writer.progress() if self._with_progress else None
        return KEEP_ALIVE if told is None else event(told)


class _Silence:
    """Calls back when nothing was sent for so many seconds, and again each time after as many.

    One timer for a stream: setting one for each event would cost as much as making the event.
    """

    def __init__(self, seconds: float, on_silence: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds, self._on_silence = seconds, on_silence
        self._since = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def restart(self) -> None:
        """Count from now on."""
        self._since = self._loop.time()

    def has_lasted(self) -> bool:
        """Whether it is long enough."""
        return self._loop.time() - self._since >= self._seconds

    def end(self) -> None:
        """Call back no more."""
        self._timer.cancel()

    def _look(self) -> None:
        left = self._since + self._seconds - self._loop.time()
        if left <= 0:
            self._on_silence()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._look)
