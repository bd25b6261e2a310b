"""Memory in huge pages: what every step reads misses fewer translations of addresses there."""

from __future__ import annotations

import mmap

import numpy as np


def map_huge_pages(num_bytes: int) -> np.ndarray:
    """Map zeroed memory, in huge pages where the system has them; none is committed yet.

    Args:
        num_bytes: at least 1.

    Returns:
        (num_bytes) uint8, which holds the mapping.

    Raises:
        OSError, ValueError: the system has no such memory.
    """
    # Private: what mmap shares by default gets no huge pages on most systems.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
