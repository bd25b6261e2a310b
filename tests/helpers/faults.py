"""Raise an exception at one chosen call of all that are made in a piece of code."""

import sys
from collections.abc import Callable


class Faults:
    """Count the calls that functions make, of Python and of C, and raise at one of them.

    Args:
        at: which one, from 0; None: only count.
        error: what to raise there.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error = at, error
        self.count = 0
        self.raised_in = ""

    def call(self, function: Callable, *args):
        """Call a function; its calls are counted, and one of them may raise."""
        sys.setprofile(self._on_event)
        try:
            return function(*args)
        finally:
            sys.setprofile(None)

    def _on_event(self, frame, event: str, argument: object) -> None:
        if event not in ("call", "c_call") or frame.f_code.co_filename == __file__:
            return
        self.count += 1
        if self.count - 1 == self.at:
            called = argument.__name__ if event == "c_call" else frame.f_code.co_name
            self.raised_in = f"{event} {called} in {frame.f_code.co_filename}:{frame.f_lineno}"
            raise self.error("injected")
