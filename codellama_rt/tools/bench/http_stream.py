"""A client of a few lines for streams over HTTP/1.1: what `bench serve` measures with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit


class Endpoint:
    """Where streams are asked for.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        key: sent with each request; None: none.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        self._address = parts.hostname, parts.port or 80
        self._key = key

    async def events(self, path: str, body: dict) -> AsyncIterator[dict]:
        """Yield the events of a stream as they come.

        Raises:
            OSError: no connection, or it broke off.
            RuntimeError: an answer other than 200, or an event that tells an error.
        """
        reader, writer = await asyncio.open_connection(*self._address, limit=2**24)
        try:
            writer.write(self._request(path, json.dumps(body).encode()))
            await writer.drain()
            status = await self._head(reader)
            if status != 200:
                text = (await reader.read(2000)).decode("utf-8", "replace")
                raise RuntimeError(f"the server answered {status}: {text}")
            async for event in _events(_chunks(reader)):
                if "error" in event:
                    raise RuntimeError(f"the server ended a stream: {event['error']}")
                yield event
        finally:
            writer.close()

    def _request(self, path: str, body: bytes) -> bytes:
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self._address[0]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def _head(self, reader: asyncio.StreamReader) -> int:
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunk = await reader.readexactly(size + 2)
        yield chunk[:-2]


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    rest = b""
    async for chunk in chunks:
        *parts, rest = (rest + chunk).split(b"\n\n")
        for part in parts:
            if part.startswith(b"data: {"):
                yield json.loads(part[6:])
