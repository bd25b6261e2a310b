"""Work that takes longer than a step of the event loop should: in a thread, if there is much of it.

Python runs one thread at a time, but lets another go on after some milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_SHORT = 2**13  # characters that are encoded in less than a millisecond
TOKEN_SIZE = 16  # a token with its text and log-probabilities takes as long as so many characters


async def beside_loop(size: int, work: Callable[..., Result], *given: Any) -> Result:
    """Return what `work` returns.

    Args:
        size: how much it is, in characters to be encoded.
        work: called here, or in a thread if that takes long.
        given: its arguments.
    """
    return work(*given) if size <= _SHORT else await asyncio.to_thread(work, *given)
