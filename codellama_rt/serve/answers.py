"""Whole answers, in compact JSON."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from codellama_rt.serve.errors import ApiError, ClientLeftError, api_error
from codellama_rt.serve.event_stream import EventStream, Writer
from codellama_rt.serve.generation import Gained, Generation, size_of
from codellama_rt.serve.long_work import beside_loop
from codellama_rt.serve.protocol import Sampling


class JSONAnswer(Response):
    """A value or a type of msgspec in one line of JSON, without spaces."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return msgspec.json.encode(content)


class Form(Writer, Protocol):
    """The form of an endpoint's answers, in events or whole."""

    def whole(self, gained: Gained) -> Any:
        """Return the answer to a request that is not streamed, as a value for JSON."""


async def stream_or_whole(
    request: Request, generation: Generation, form: Form, wanted: Sampling
) -> EventStream | JSONAnswer:
    """Return the answer to a request whose prompts are queued; raises as `Generation.finish`."""
    if wanted.stream:
        keep_alive_s = request.app.state.service.settings.keep_alive_s
        progress = bool(wanted.return_progress)
        return EventStream(generation, form, keep_alive_s, with_progress=progress)
    async with generation.watching(request.receive):
        gained = await generation.finish()
        return await beside_loop(size_of(gained), lambda: JSONAnswer(form.whole(gained)))


class NoAnswer:
    """What a client that has left gets: nothing."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send 499, which no one reads, so that the server's books are in order."""
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def error_answer(error: ApiError) -> JSONAnswer:
    """Return an error as an answer."""
    return JSONAnswer(error.body, status_code=error.status, headers=error.headers)


def answered(endpoint: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    """Return an endpoint whose exceptions are answers."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except ClientLeftError:
            return NoAnswer()
        except Exception as error:
            return error_answer(api_error(error, getattr(request.state, "known", frozenset())))

    return answer


async def on_http_error(request: Request, error: Any) -> JSONAnswer:
    """Answer what Starlette refuses: an unknown path, another method."""
    path = request.scope["path"]
    messages = {404: f"there is no {path[:200]} here", 405: f"{path} does not take this method"}
    message = messages.get(error.status_code, str(error.detail))
    return error_answer(ApiError(error.status_code, message, headers=dict(error.headers or {})))
