"""Who may use an engine: one thread at a time, in the order in which they came."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
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
        self._release()
        _owners.add(self)

    def is_free(self) -> bool:
        """Return whether nobody holds it: entering would not wait. May be called anywhere."""
        return self._holder is None and not self._mutex.locked()

    def is_inside(self) -> bool:
        """Return whether the caller was itself called from inside `with owner:`."""
        frame = sys._getframe(1) if self._holder == threading.get_ident() else None
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def __enter__(self) -> None:
        """Wait for the turn, and recover if need be.

        Raises:
            RuntimeError: called from inside.
        """
        if self.is_inside():
            raise RuntimeError("an engine cannot be used from inside its own step")
        me = threading.get_ident()
        if self._holder != me:  # else an exception kept this thread from leaving
            self._wait(me)
        self._frame = sys._getframe(1)
        if self._is_torn:
            self._recover()
        self._is_torn = True

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Hand over to the thread that has waited longest."""
        if kind is None:
            self._is_torn = False
        self._frame = None
        with self._mutex:
            self._hand_over()

    def _wait(self, me: int) -> None:
        turn = threading.Lock()
        turn.acquire()
        entry = turn, me
        with self._mutex:
            if self._holder is None:
                self._holder = me
                return
            self._queue.append(entry)
        try:
            turn.acquire()  # until the holder before this one hands over
        except BaseException:
            with self._mutex:
                if entry in self._queue:
                    self._queue.remove(entry)
                else:
                    self._hand_over()
            raise

    def _hand_over(self) -> None:
        if not self._queue:
            self._holder = None
            return
        turn, self._holder = self._queue.popleft()
        turn.release()

    def _release(self) -> None:
        """Forget who holds it and who waits: a forked child has none of those threads."""
        self._mutex = threading.Lock()  # held for moments, to change the queue
        self._queue: deque[tuple[threading.Lock, int]] = deque()
        self._holder: int | None = None
        self._frame = None  # where the holder is inside


_owners: WeakSet[Owner] = WeakSet()


def _release_all() -> None:
    for owner in _owners:
        owner._release()


os.register_at_fork(after_in_child=_release_all)
