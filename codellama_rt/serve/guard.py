"""What stands before every endpoint: a request's id, its key, and a line of log at its end.

Plain ASGI: Starlette's BaseHTTPMiddleware would stand between an endpoint and its disconnects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from codellama_rt.serve.answers import error_answer
from codellama_rt.serve.errors import ApiError
from codellama_rt.serve.service import Service

logger = logging.getLogger("codellama_rt.serve")
_OPEN = frozenset({"/health", "/ping"})
_ID = re.compile(r"[\w.:=+/-]{1,128}", re.ASCII)
_METHODS = "GET, POST, OPTIONS"


class Guard:
    """An ASGI application before another one.

    Args:
        app: gets the requests that pass; `scope["request_id"]` is their id.
        service: of the application; its settings have keys and origins.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self.service = service
        self._app, self._settings = app, service.settings
        self._digests = [_digest(key) for key in service.settings.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), perf_counter()
        given = headers.get("x-request-id", "")
        scope["request_id"] = request_id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        origin = self._allowed_origin(headers.get("origin"))
        status = 499  # as nginx has it: the client left before an answer

        async def send_marked(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = request_id
                if origin is not None:
                    marked["Access-Control-Allow-Origin"] = origin
                    marked["Vary"] = "Origin"
            await send(message)

        try:
            await self._answer(scope, headers, origin, receive, send_marked)
        finally:
            seconds = perf_counter() - started
            line = "%s %s %d %.3f s %s"
            logger.info(line, scope["method"], scope["path"], status, seconds, request_id)

    async def _answer(
        self, scope: Any, headers: Headers, origin: str | None, receive: Any, send: Any
    ) -> None:
        if scope["method"] == "OPTIONS" and origin is not None:
            await _preflight(send)
        elif not self._is_known(scope["path"], headers):
            challenge = "Basic" if scope["path"] == "/" else "Bearer"
            error = ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": f'{challenge} realm="codellama_rt"'},
            )
            await error_answer(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, path: str, headers: Headers) -> bool:
        is_open = path in _OPEN or (path == "/metrics" and self._settings.open_metrics)
        if is_open or not self._digests:
            return True
        given = _digest(_key(headers))
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found)  # after all comparisons: the time tells nothing

    def _allowed_origin(self, origin: str | None) -> str | None:
        allowed = self._settings.allowed_origins
        return origin if origin is not None and ("*" in allowed or origin in allowed) else None


def _key(headers: Headers) -> str:
    """Return the key of a request, "" for none; a browser sends it as the password of Basic."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def _preflight(send: Any) -> None:
    headers = [
        (b"access-control-allow-methods", _METHODS.encode()),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
