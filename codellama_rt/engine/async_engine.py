"""The engine for asyncio: one thread makes the steps, any number of tasks read their streams.

Nothing that a task does waits for a step, and nothing that a step does waits for a task: requests
and aborts are left for the thread, which takes them up before its next step, and outputs are left
for the tasks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.output import Output
from codellama_rt.engine.request import Request
from codellama_rt.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
_DRAIN_POLL_S = 0.02


class AsyncEngine:
    """Stream the outputs of an engine's requests to tasks of any event loops.

    The engine belongs to this object's thread from the first request until `close`.

    Example:
        >>> async def main(llm):
        ...     async with AsyncEngine(llm.engine) as engine:
        ...         async for output in engine.generate([1, 15043], SamplingParams()):
        ...             print(output.text, end="")
        >>> asyncio.run(main(llm))  # doctest: +SKIP
    """

    def __init__(self, engine: Engine) -> None:
        """Take an engine that nothing else steps; its thread starts with the first request."""
        self.engine = engine
        self._streams: dict[str, OutputStream] = {}  # unfinished; one call takes and leaves a key
        self._tasks: deque[Callable[[], None]] = deque()  # for the thread, before its next step
        self._has_work = threading.Event()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_draining = self._is_closed = False
        self._num_requests = 0

    async def generate(
        self,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[Output]:
        """Yield a request's outputs as they are computed.

        When the task is cancelled, or the iterator closed, the request ends before the next step.

        Args:
            prompt_token_ids: at least one token id.
            params: how to sample; None: greedy.
            request_id: unique among the unfinished requests; None: a new one.
            options: priority, adapter and cache_salt, as `Engine.add_request` takes them.

        Raises:
            ValueError, TypeError: as there.
            QueueFullError: too many prompt tokens wait.
            RuntimeError: the engine is closed or draining, or has lost the request.
            Exception: what ended this request.
        """
        stream = await self.add_request(prompt_token_ids, params, request_id=request_id, **options)
        try:
            async for output in stream:
                yield output
        finally:
            self.abort(stream.request_id)

    async def add_request(
        self,
        prompt_token_ids: Collection[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        ready: asyncio.Event | None = None,
        **options: Any,
    ) -> OutputStream:
        """Queue a request and return its outputs' iterator, for whom `generate` is too lazy.

        Arguments and errors are those of `generate`. Whoever drops the iterator calls `abort`.

        Args:
            prompt_token_ids, params, request_id, options: as for `generate`.
            ready: set whenever the stream has something new; streams may share one event, so that
                a task can wait for any of them. None: an event of its own.
        """
        if request_id is None:
            self._num_requests += 1
            request_id = f"async-{self._num_requests}"
        inbox: deque[Output] = deque()
        request = await asyncio.to_thread(  # a prompt of 100k tokens takes some milliseconds
            self.engine.admission.make_request,
            request_id,
            prompt_token_ids,
            params,
            inbox=inbox,
            **options,
        )
        self.engine.check_queue(request.samples[0].sequence.prompt_len)
        self._check_open()
        stream = OutputStream(request, inbox, asyncio.get_running_loop(), ready)
        if self._streams.setdefault(request_id, stream) is not stream:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        self._hand_over(lambda: self._submit(stream))
        return stream

    def abort(self, request_id: str) -> None:
        """End a request before the next step; an unknown or finished one is ignored.

        It may be called in any thread and does not wait.
        """
        stream = self._streams.get(request_id)
        if stream is not None:
            self._hand_over(lambda: self._abort(stream))

    def abort_all(self) -> None:
        """Abort every unfinished request, as `abort` does."""
        for request_id in list(self._streams):
            self.abort(request_id)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, after a step under way, as `Engine.reset_prefix_cache`."""
        return await asyncio.to_thread(self.engine.reset_prefix_cache)

    def stats(self) -> dict[str, Any]:
        """Return the engine's statistics; it does not wait for a step under way."""
        return self.engine.stats()

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not had their last output."""
        return len(self._streams)

    async def drain(self) -> None:
        """Refuse further requests, and wait until those under way have ended."""
        self._is_draining = True
        while self._streams:
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Abort what is unfinished, and end the thread after a step under way."""
        self._is_closed = True
        self._has_work.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        """Return the engine itself."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Close it."""
        await self.close()

    def _check_open(self) -> None:
        self.engine.check_open()
        if self._is_closed or self._is_draining:
            state = "closed" if self._is_closed else "draining: it takes no further requests"
            raise RuntimeError(f"the AsyncEngine is {state}")

    def _hand_over(self, task: Callable[[], None]) -> None:
        """Leave a task for the thread, which is started if need be."""
        self._tasks.append(task)
        self._has_work.set()
        if self._thread is None:
            with self._start:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="codellama_rt.AsyncEngine", daemon=True
                    )
                    self._thread.start()

    # ---- in the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closed:
            self._has_work.clear()
            while self._tasks:
                self._tasks.popleft()()
            if self._streams:
                self._step()
            else:
                self._has_work.wait()
        while self._tasks:  # whoever comes too late is told so
            self._tasks.popleft()()
        for stream in list(self._streams.values()):
            self._abort(stream)
        self._deliver()

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:
            logger.exception("a step failed; the unfinished requests end with its error")
            for stream in list(self._streams.values()):
                stream.error = error
                self._abort(stream)
        self._deliver()

    def _submit(self, stream: OutputStream) -> None:
        try:
            self.engine.submit(stream.request)
        except Exception as error:
            stream.error = error

    def _abort(self, stream: OutputStream) -> None:
        self.engine.abort(stream.request.request_id)  # its last outputs are left in the inbox
        stream.is_over = True

    def _deliver(self) -> None:
        """Wake the tasks that have something to read, by one call per event loop."""
        woken: dict[asyncio.AbstractEventLoop, list[OutputStream]] = {}
        for request_id, stream in list(self._streams.items()):
            is_over = stream.is_over or stream.error is not None or stream.request.is_finished
            if is_over:
                del self._streams[request_id]
            if is_over or stream.inbox:
                woken.setdefault(stream.loop, []).append(stream)
        for loop, streams in woken.items():
            try:
                loop.call_soon_threadsafe(_wake, streams)
            except RuntimeError:  # that loop is closed, so nobody reads these any more
                for stream in streams:
                    self._abort(stream)
                    self._streams.pop(stream.request.request_id, None)


class OutputStream:
    """The outputs of one request on their way to the task that reads them."""

    def __init__(
        self,
        request: Request,
        inbox: deque[Output],
        loop: asyncio.AbstractEventLoop,
        ready: asyncio.Event | None = None,
    ) -> None:
        """Start with nothing to read."""
        self.request, self.inbox, self.loop = request, inbox, loop
        self.error: Exception | None = None  # of all of it
        self.is_over = False  # nothing more is put into the inbox
        self.is_ready = asyncio.Event() if ready is None else ready
        self._unfinished = request.params.n

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.request.request_id

    @property
    def has_ended(self) -> bool:
        """Whether every sample's last output has been read."""
        return not self._unfinished

    def take(self) -> list[Output]:
        """Return all outputs that have come and have not been read, without waiting.

        Raises:
            Exception: what ended this request.
        """
        outputs = []
        while self.inbox:
            outputs.append(self._checked(self.inbox.popleft()))
        if not outputs and self.error is not None and self._unfinished:
            self._unfinished = 0
            raise self.error
        return outputs

    def __aiter__(self) -> OutputStream:
        """Return itself."""
        return self

    async def __anext__(self) -> Output:
        """Return the next output."""
        while not self.inbox:
            if self.error is not None:
                raise self.error
            if not self._unfinished:
                raise StopAsyncIteration
            self.is_ready.clear()
            if not self.inbox and self.error is None:
                await self.is_ready.wait()
        return self._checked(self.inbox.popleft())

    def _checked(self, output: Output) -> Output:
        """Return an output, counted if it is a last one; raise the error that it brings."""
        if output.error is not None:
            self._unfinished = 0
            raise output.error
        self._unfinished -= output.finished
        return output


def _wake(streams: list[OutputStream]) -> None:
    for stream in streams:
        stream.is_ready.set()
