"""The engine for asyncio: one thread makes the steps, any number of tasks read their streams.

Nothing that a task does waits for a step, and nothing that a step does waits for a task: requests
and aborts are left for the thread, which takes them up before its next step, and outputs are left
for the loops. A loop sorts its mail and wakes its readers together, only so often that this takes a
small share of the time: one thread at a time runs Python, and on few cores the loop stops one of
the threads that compute a step, for which the others wait.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.output import Output
from codellama_rt.engine.output_stream import Bell, OutputStream
from codellama_rt.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
_DRAIN_POLL_S = 0.02
_STREAM_INTERVAL_S = 0.02  # 50 times a second looks like without a break
_SHORT_PROMPT = 2048  # tokens that are checked within a millisecond


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

    def __init__(self, engine: Engine, *, stream_interval_s: float = _STREAM_INTERVAL_S) -> None:
        """Take an engine that nothing else steps; its thread starts with the first request.

        Args:
            engine: makes the steps.
            stream_interval_s: how often the reader of a stream is woken at most, except for its
                first and its last token; what has come meanwhile is joined. 0: after each step.
        """
        if not 0 <= stream_interval_s < math.inf:
            raise ValueError(f"stream_interval_s must be at least 0, got {stream_interval_s}")
        self.engine = engine
        self._stream_interval_s = stream_interval_s
        self._streams: dict[str, OutputStream] = {}  # unfinished; one call takes or leaves a key
        self._bells: dict[asyncio.AbstractEventLoop, Bell] = {}  # the same
        self._beginning: list[OutputStream] = []  # of the thread: queued, without a token so far
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

        What a sample has gained since the task last looked comes as one output. When the task is
        cancelled, or the iterator closed, the request ends before the next step.

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
                a task can wait for any of them.
        """
        if request_id is None:
            self._num_requests += 1
            request_id = f"async-{self._num_requests}"
        make, loop = self.engine.admission.make_request, asyncio.get_running_loop()
        is_quick = params is None or params.structured_outputs is None
        if is_quick and len(prompt_token_ids) <= _SHORT_PROMPT:
            request = make(request_id, prompt_token_ids, params, **options)
        else:
            request = await asyncio.to_thread(make, request_id, prompt_token_ids, params, **options)
        self.engine.check_queue(request.samples[0].sequence.prompt_len)
        self.check_open()
        for other in [other for other in list(self._bells) if other.is_closed()]:
            self._bells.pop(other, None)
        bell = self._bells.setdefault(loop, Bell(loop, self._stream_interval_s))
        stream = OutputStream(request, bell, ready)
        if self._streams.setdefault(request_id, stream) is not stream:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        stream.bell.add(stream)
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

    def check_open(self) -> None:
        """Raise RuntimeError if no request is taken any more."""
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
        try:
            self._work()
        except BaseException as error:  # a fault of this class: nobody is left waiting
            logger.exception("the AsyncEngine ends with its thread")
            self._is_closed = True
            for stream in list(self._streams.values()):
                self._abort(stream, RuntimeError(f"the AsyncEngine has failed: {error!r}"))

    def _work(self) -> None:
        while not self._is_closed:
            while self._tasks:
                self._tasks.popleft()()
            if self._streams:
                self._step()
            else:
                self._has_work.wait()
                self._has_work.clear()  # before the tasks are looked at
        while self._tasks:  # whoever comes too late is told so
            self._tasks.popleft()()
        for stream in list(self._streams.values()):
            self._abort(stream)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            logger.exception("a step failed; the unfinished requests end with its error")
            for stream in list(self._streams.values()):
                self._abort(stream, error)
        else:
            self._deliver(outputs)

    def _submit(self, stream: OutputStream) -> None:
        try:
            self.engine.submit(stream.request)
        except Exception as error:
            self._end(stream, error)
        else:
            self._beginning.append(stream)

    def _abort(self, stream: OutputStream, error: Exception | None = None) -> None:
        """End a stream by an error, or with its request's last outputs."""
        if self._streams.get(stream.request_id) is stream:
            stream.bell.post(self.engine.abort(stream.request_id))
            self._end(stream, error)

    def _end(self, stream: OutputStream, error: Exception | None = None) -> None:
        """Let a stream's reader know that nothing more comes; from now on the name is free."""
        stream.bell.post_end(stream, error)
        del self._streams[stream.request_id]
        self._ring(stream.bell, is_urgent=True)

    def _deliver(self, outputs: list[Output]) -> None:
        """Post the outputs of a step to the loops of their readers."""
        streams = dict(self._streams)  # at one moment: tasks add their own meanwhile
        by_bell = self._by_bell(outputs, streams)
        for bell, its in by_bell.items():
            bell.post(its)
        if len(streams) != len(self.engine.table.requests):
            for stream in [s for s in streams.values() if s.request.is_finished]:
                if stream.request_id in self._streams:
                    self._end(stream)
        urgent = set()
        if self._beginning:
            begun = [s for s in self._beginning if s.request.clock.first_token is not None]
            urgent = {stream.bell for stream in begun}
            unfinished = set(dict(self._streams).values()).difference(begun)
            self._beginning = [s for s in self._beginning if s in unfinished]
        for bell in by_bell:
            self._ring(bell, is_urgent=bell in urgent)

    def _by_bell(
        self, outputs: list[Output], streams: dict[str, OutputStream]
    ) -> dict[Bell, list[Output]]:
        """Return each loop's outputs, those of streams that have gone left out or in any."""
        bells = list(self._bells.values())
        if len(bells) == 1:
            return {bells[0]: outputs}
        by_bell: dict[Bell, list[Output]] = {}
        for output in outputs:
            stream = streams.get(output.request_id)
            if stream is not None:
                by_bell.setdefault(stream.bell, []).append(output)
        return by_bell

    def _ring(self, bell: Bell, *, is_urgent: bool) -> None:
        try:
            bell.ring(is_urgent=is_urgent)
        except RuntimeError:  # the loop is closed, so nobody reads its streams any more
            self._bells.pop(bell.loop, None)
            for stream in [s for s in list(self._streams.values()) if s.bell is bell]:
                self.engine.abort(stream.request_id)
                del self._streams[stream.request_id]
