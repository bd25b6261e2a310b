"""The engine's outputs for one client, until they end or the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import Any, Protocol

from codellama_rt.engine.async_engine import AsyncEngine
from codellama_rt.engine.output import Output, joined
from codellama_rt.engine.output_stream import OutputStream
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.serve.errors import ClientLeftError
from codellama_rt.serve.long_work import TOKEN_SIZE

Gained = dict[tuple[int, int], Output]  # (prompt, sample) -> what it gained


def size_of(gained: Gained) -> int:
    """Return how long it takes to write outputs down, as `beside_loop` has it."""
    rows = [len(output.token_ids) + len(output.prompt_logprobs or ()) for output in gained.values()]
    return TOKEN_SIZE * sum(rows)


class Observer(Protocol):
    """Who wants to know of requests that begin and samples that end."""

    def begin(self, params: SamplingParams) -> None:
        """Take note of a request."""

    def end(self, output: Output) -> None:
        """Take note of a sample's last output."""


class Generation:
    """Requests of the engine whose outputs one client gets together.

    Whoever has one calls `abort` at the end, whatever happens.
    """

    def __init__(self, engine: AsyncEngine, observer: Observer) -> None:
        """Start without a request."""
        self._engine, self._observer = engine, observer
        self._ready = asyncio.Event()
        self.streams: list[OutputStream] = []
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self._has_left = self._is_interrupted = False

    async def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        options: dict[str, Any],
    ) -> None:
        """Queue a prompt; raises as `AsyncEngine.add_request`."""
        stream = await self._engine.add_request(
            token_ids, params, request_id=request_id, ready=self._ready, **options
        )
        self.streams.append(stream)
        self.num_prompt_tokens += len(token_ids)
        self._observer.begin(params)

    @property
    def has_ended(self) -> bool:
        """Whether every output has been taken."""
        return all(stream.has_ended for stream in self.streams)

    def progress(self) -> dict[str, int] | None:
        """Return how far the first prompt is, by llama.cpp's names, or None once it is computed."""
        request = self.streams[0].request
        sequence = request.samples[0].sequence
        computed = min(sequence.num_computed, sequence.prompt_len)
        if computed >= sequence.prompt_len or self.num_output_tokens:
            return None
        return {
            "total": sequence.prompt_len,
            "cache": request.clock.cached_tokens,
            "processed": computed,
            "time_ms": round(1e3 * (perf_counter() - request.clock.arrival)),
        }

    async def take(self) -> Gained:
        """Wait for outputs, and return all that have come, joined per sample.

        Returns:
            Nothing where all has ended, or `interrupt` was called.

        Raises:
            ClientLeftError: the client has gone.
            Exception: what ended a request.
        """
        while True:
            self._ready.clear()
            if self._has_left:
                raise ClientLeftError
            gained = self._gained()
            if gained or self.has_ended or self._is_interrupted:
                self._is_interrupted = False
                return gained
            await self._ready.wait()

    def interrupt(self) -> None:
        """Have a task that waits in `take` go on without outputs."""
        self._is_interrupted = True
        self._ready.set()

    async def finish(self) -> Gained:
        """Wait for the ends, and return everything; raises as `take`."""
        parts: dict[tuple[int, int], list[Output]] = {}
        while gained := await self.take():
            for key, output in gained.items():
                parts.setdefault(key, []).append(output)
        return {key: joined(outputs)[0] for key, outputs in sorted(parts.items())}

    def abort(self) -> None:
        """End what is unfinished; it does not wait."""
        for stream in self.streams:
            if not stream.has_ended:
                self._engine.abort(stream.request_id)

    @contextlib.asynccontextmanager
    async def watching(self, receive: Any) -> AsyncIterator[None]:
        """Abort the requests when the client leaves, and at the end of the `with` block.

        Args:
            receive: ASGI's, after the body.
        """
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.abort()

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self.abort()  # now, for a task that is about to send something may not come to it
        self._ready.set()

    def _gained(self) -> Gained:
        gained: Gained = {}
        for i, stream in enumerate(self.streams):
            for output in stream.take():
                gained[i, output.index] = output
                self.num_output_tokens += len(output.token_ids)
                if output.finished:
                    self._end(output)
        return gained

    def _end(self, output: Output) -> None:
        if output.index == 0:
            self.num_cached_tokens += output.metrics.cached_tokens
        self._observer.end(output)
