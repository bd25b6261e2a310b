"""Outputs on their way from the engine's thread to the tasks of an event loop that read them."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from codellama_rt.engine.output import Output, extend_output, joined
from codellama_rt.engine.request import Request

# What the samples of some streams have gained, each as one output; or the end of a stream.
Mail = dict[tuple[str, int], Output] | tuple["OutputStream", Exception | None]


class Bell:
    """Brings the outputs of a step to the streams of one event loop, and wakes their readers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
        """Start with no streams; their readers are woken once in `interval_s`."""
        self.loop = loop
        self._interval_s = interval_s
        self._mail: deque[Mail] = deque()  # from the thread
        self._is_rung = False
        # Used in the loop alone:
        self._due = -math.inf  # when readers are woken next
        self._alarm: asyncio.TimerHandle | None = None  # for then
        self._unread: set[OutputStream] = set()  # whose readers are to be woken then
        self._streams: dict[str, OutputStream] = {}  # for mail

    def post(self, outputs: list[Output]) -> None:
        """Leave outputs of a step; `ring` has them looked at.

        Those of a sample are joined here, while they are in this thread's cache: what the loop
        spends on them, the thread waits for.
        """
        try:
            mail = self._mail.pop()  # nobody else has it now
        except IndexError:
            mail = {}
        if isinstance(mail, tuple):
            self._mail.append(mail)
            mail = {}
        for output in outputs:
            first = mail.setdefault((output.request_id, output.index), output)
            if first is not output:
                extend_output(first, output)
        self._mail.append(mail)

    def post_end(self, stream: OutputStream, error: Exception | None) -> None:
        """Leave the end of a stream."""
        self._mail.append((stream, error))

    def ring(self, *, is_urgent: bool) -> None:
        """Have the mail sorted: at once, or when readers are woken next.

        Raises:
            RuntimeError: the loop is closed.
        """
        if is_urgent:
            self.loop.call_soon_threadsafe(self._sort)
        elif not self._is_rung:
            self._is_rung = True
            self.loop.call_soon_threadsafe(self._wait)

    def add(self, stream: OutputStream) -> None:
        """Take a stream whose name nobody else has; mail for one of the same name comes first."""
        self._sort()
        self._streams[stream.request_id] = stream

    def _wait(self) -> None:
        if self.loop.time() >= self._due:
            self._sort()
        elif self._alarm is None:
            self._alarm = self.loop.call_at(self._due, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = None
        self._sort()

    def _sort(self) -> None:
        self._is_rung = False  # first, for what comes later rings again
        while self._mail:
            mail = self._mail.popleft()
            if isinstance(mail, tuple):
                stream, stream.error = mail
                stream.is_over = True
                if self._streams.get(stream.request_id) is stream:
                    del self._streams[stream.request_id]
                self._unread.add(stream)
                continue
            for output in mail.values():
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.inbox.append(output)
                    self._unread.add(stream)
        if self._unread:
            self._wake()

    def _wake(self) -> None:
        """Wake all readers if it is time, else those whose stream begins or ends."""
        woken, now = self._unread, self.loop.time()
        if now >= self._due:
            self._due = now + self._interval_s
        else:
            woken = {stream for stream in woken if stream.is_over or not stream.has_begun}
        self._unread = self._unread - woken
        for stream in woken:
            stream.wake()
        if self._unread:
            self._wait()


class OutputStream:
    """The outputs of one request on their way to the task that reads them."""

    def __init__(self, request: Request, bell: Bell, ready: asyncio.Event | None = None) -> None:
        """Start with nothing to read; `ready` is set when that changes."""
        self.request, self.bell = request, bell
        self.request_id = request.request_id
        self.inbox: list[Output] = []
        self.error: Exception | None = None  # of all of it
        self.has_begun = self.is_over = False  # the reader was woken; nothing more will come
        self._taken: deque[Output] = deque()  # from the inbox, at most one per sample
        self._unfinished = request.params.n
        self._reader: asyncio.Future | None = None  # that waits
        self._ready = ready

    @property
    def has_ended(self) -> bool:
        """Whether every sample's last output has been read."""
        return not self._unfinished

    def take(self) -> list[Output]:
        """Return what the samples have gained, joined per sample, without waiting.

        Raises:
            Exception: what ended this request.
        """
        outputs = joined(self.inbox) if self.inbox else []
        self.inbox = []
        for output in outputs:
            self._count(output)
        if not outputs and self.is_over and self._unfinished:
            self._unfinished = 0
            if self.error is not None:
                raise self.error
        return outputs

    def wake(self) -> None:
        """Let the reader look."""
        self.has_begun = True
        if self._ready is not None:
            self._ready.set()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> OutputStream:
        """Return itself."""
        return self

    async def __anext__(self) -> Output:
        """Return what a sample has gained."""
        while not self._taken:
            if self.inbox:
                self._taken += joined(self.inbox)
                self.inbox = []
            elif self.error is not None:
                raise self.error
            elif not self._unfinished or self.is_over:
                raise StopAsyncIteration
            else:
                self._reader = self.bell.loop.create_future()
                await self._reader
        return self._count(self._taken.popleft())

    def _count(self, output: Output) -> Output:
        if output.error is not None:
            self._unfinished = 0
            raise output.error
        self._unfinished -= output.finished
        return output
