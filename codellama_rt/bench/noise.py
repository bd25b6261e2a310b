"""Made-up values: kernels take as long for them as for real ones."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.dtypes import numpy_dtype
from codellama_rt.ops import Quantized

_PERIOD = 1_000_003  # elements that repeat in larger arrays; a prime, so that rows differ
_PAGES = 7  # that repeat in a cache


def noise(
    shape: tuple[int, ...], dtype: str, rng: np.random.Generator, width: float = 1.0
) -> np.ndarray:
    """Values in [-width / 2, width / 2)."""
    values = rng.random(min(int(np.prod(shape)), _PERIOD), np.float32) - np.float32(0.5)
    return np.resize((values * np.float32(width)).astype(numpy_dtype(dtype)), shape)


def fill_pages(pages: np.ndarray | Quantized, rng: np.random.Generator) -> None:
    """Fill a cache (num_blocks, n_kv_heads, block_size, head_dim) with noise, in place."""
    num_blocks, n_kv_heads, block_size, head_dim = pages.shape
    count = min(_PAGES, num_blocks)
    rows = noise((count * block_size, n_kv_heads, head_dim), "float32", rng)
    slots = np.arange(count * block_size, dtype=np.int32)
    ops.reshape_and_cache(rows, rows, pages, pages, slots)
    stored = pages.payload if isinstance(pages, Quantized) else pages
    stored = stored.reshape(num_blocks, -1)
    for begin in range(count, num_blocks, count):
        stored[begin : begin + count] = stored[: min(count, num_blocks - begin)]
