"""Hold the steps of an engine that a thread makes, so that no test races with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from codellama_rt.engine.engine import Engine


class HeldSteps:
    """The steps of an engine; each waits until it is allowed.

    Args:
        engine: nobody has replaced its method `step`.

    Attributes:
        step: makes one; a test may replace it.
        num_made: so far.
    """

    def __init__(self, engine: Engine) -> None:
        self.step, self.num_made = engine.step, 0
        self._allowed = threading.Semaphore(0)
        engine.step = self._wait

    def allow(self, count: int = 1) -> None:
        """Let the engine make so many further steps."""
        self._allowed.release(count)

    def _wait(self):
        self._allowed.acquire()
        try:
            return self.step()
        finally:
            self.num_made += 1


@contextlib.contextmanager
def holding(engine: Engine) -> Iterator[HeldSteps]:
    """Hold the steps of an engine; from the end of the `with` block on it makes all it wants."""
    steps = HeldSteps(engine)
    try:
        yield steps
    finally:
        del engine.step
        steps.allow()  # the one that waits
