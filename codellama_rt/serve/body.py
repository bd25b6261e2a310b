"""The body of a request, as a value of one of `protocol`'s types."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from codellama_rt.serve.errors import ApiError, ClientLeftError, invalid

T = TypeVar("T", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_MAX_NAME = 64


async def read_body(request: Request, kind: type[T], *, most: int, timeout_s: float) -> T:
    """Read a JSON body.

    Args:
        request: whose body has not been read yet.
        kind: what it must be; unknown fields are ignored.
        most: bytes.
        timeout_s: for all of it.

    Raises:
        ApiError: 400, with the field's name; 408, 413, 415.
        ClientLeftError: the client did not send all of it.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, f"expected Content-Type: application/json, got {content_type!r:.80}")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    try:
        body = await asyncio.wait_for(_read(request, most), timeout_s)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s") from None
    if len(body) > 2**16:  # which takes longer than a step of the event loop should
        return await asyncio.to_thread(decode, body, kind)
    return decode(body, kind)


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise _too_large(most)
    except ClientDisconnect:
        raise ClientLeftError from None
    return bytes(body)


def _too_large(most: int) -> ApiError:
    headers = {"Connection": "close"}  # whatever else of it comes is not read
    return ApiError(413, f"a body has at most {most} bytes", headers=headers)


def decode(body: bytes, kind: type[T]) -> T:
    """Return a body's value.

    Raises:
        ApiError: 400, with the field's name.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    try:
        return msgspec.convert(_with_integers(value), kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def _with_integers(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with 1e2 as the integer that JSON Schema says it is."""
    return {
        name: int(item) if isinstance(item, float) and item.is_integer() else item
        for name, item in value.items()
    }


def _named(message: str) -> ApiError:
    missing, place = _MISSING.search(message), _PLACE.search(message)
    name = place[1] if place else missing[1] if missing else None
    if name is None:
        return invalid(message)
    text = _PLACE.sub("", message)
    message = f"{name[:_MAX_NAME]}: {text[:1].lower()}{text[1:]}"
    return invalid(message, re.split(r"[.\[]", name, maxsplit=1)[0])
