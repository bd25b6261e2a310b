"""Who may use an engine: one thread at a time, in the order in which they came."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from sys import _getframe
from threading import Lock, get_ident
from types import FrameType
from weakref import WeakSet


class Owner:
    """A lock with a queue, which knows when its last holder was interrupted.

    Any exception may leave what `with owner:` protects half done; the next holder calls `recover`
    before anything else. So nothing depends on cleaning up while an exception passes through, and
    a second Ctrl-C cannot do harm.

    Example:
        >>> owner = Owner(recover=lambda: print("recovering"))
        >>> try:
        ...     with owner:
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     pass
        >>> with owner:
        ...     print("at work")
        recovering
        at work
    """

    def __init__(self, recover: Callable[[], None]) -> None:
        """Start free; `recover` makes good what an exception left half done."""
        self._recover = recover
        self._is_torn = False
        self._forget_threads()
        _owners.add(self)

    def is_free(self) -> bool:
        """Return whether nobody holds it: entering would not wait. May be called anywhere."""
        return not self._queue

    def is_inside(self) -> bool:
        """Return whether the caller was itself called from inside `with owner:`."""
        holder = self._holder()
        return holder is not None and holder.thread == get_ident() and self._is_below(_getframe(1))

    def __enter__(self) -> None:
        """Wait for the turn, and recover if need be.

        Raises:
            RuntimeError: called from inside.
        """
        holder, me, frame = self._holder(), get_ident(), _getframe(1)
        if holder is None or holder.thread != me:
            self._wait(_Turn(me))
        elif self._is_below(frame):  # else an exception kept this thread from leaving
            raise RuntimeError("an engine cannot be used from inside its own step")
        self._frame = frame
        if self._is_torn:
            self._recover()
        self._is_torn = True

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Hand over to the thread that has waited longest."""
        if kind is None:
            self._is_torn = False
        self._frame = None
        self._queue.popleft()
        self._wake_holder()

    def _holder(self) -> _Turn | None:
        try:
            return self._queue[0]
        except IndexError:
            return None

    def _is_below(self, frame: FrameType | None) -> bool:
        """Return whether a frame of the holder was called, if indirectly, from inside."""
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _wait(self, turn: _Turn) -> None:
        self._queue.append(turn)
        try:
            if self._holder() is turn:
                return
            turn.wake = Lock()
            turn.wake.acquire()
            while self._holder() is not turn:  # looked at after `wake` is there to be released
                turn.wake.acquire(timeout=_LOST_WAKE_UP_S)
        except BaseException:
            self._queue.remove(turn)
            self._wake_holder()
            raise

    def _wake_holder(self) -> None:
        holder = self._holder()
        if holder is not None and holder.wake is not None:
            with suppress(RuntimeError):  # it is awake
                holder.wake.release()

    def _forget_threads(self) -> None:
        """Forget who holds it and who waits: a forked child has none of those threads."""
        # The first is the holder. What a deque does is atomic, so nothing else has to be locked.
        self._queue: deque[_Turn] = deque()
        self._frame: FrameType | None = None  # where the holder is inside


class _Turn:
    """A thread that holds an owner, or waits for it."""

    __slots__ = ("thread", "wake")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.wake: Lock | None = None  # released when it may look whether it is first


_LOST_WAKE_UP_S = 0.1  # an exception may keep a thread from waking the next one
_owners: WeakSet[Owner] = WeakSet()


def _forget_threads() -> None:
    for owner in _owners:
        owner._forget_threads()


os.register_at_fork(after_in_child=_forget_threads)
