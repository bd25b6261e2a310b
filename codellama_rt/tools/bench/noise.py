"""Random values: kernels take as long for them as for real ones."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.ops import Quantized
from codellama_rt.ops.dtypes import numpy_dtype
from codellama_rt.ops.quantized import (
    GGUF_BLOCKS,
    GGUF_HALVES,
    TILED,
    TILED_DTYPES,
    weight_num_bytes,
)

_PERIOD = 1_000_003  # larger arrays repeat so many elements; a prime, so that rows differ
_BLOCKS = 7  # a cache repeats so many blocks


def noise(
    shape: tuple[int, ...], dtype: str, rng: np.random.Generator, width: float = 1.0
) -> np.ndarray:
    """Return values in [-width / 2, width / 2)."""
    values = rng.random(min(int(np.prod(shape)), _PERIOD), np.float32) - np.float32(0.5)
    return np.resize((values * np.float32(width)).astype(numpy_dtype(dtype)), shape)


def quantized_noise(shape: tuple[int, int], dtype: str, rng: np.random.Generator) -> Quantized:
    """Return a quantised weight: quantised noise, or random blocks of a GGUF format."""
    if dtype in TILED_DTYPES:
        return ops.repack(quantized_noise(shape, dtype.removesuffix(TILED), rng))
    if dtype not in GGUF_BLOCKS:
        return ops.quantize(noise(shape, "bfloat16", rng), dtype)
    _, block_bytes = GGUF_BLOCKS[dtype]
    blocks = rng.integers(0, 256, (_PERIOD // block_bytes, block_bytes), np.uint8)
    for at in GGUF_HALVES[dtype]:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    payload = np.resize(blocks, weight_num_bytes(dtype, shape))
    return Quantized(payload, dtype, shape)


def fill_caches(
    key_cache: np.ndarray | Quantized, value_cache: np.ndarray | Quantized, rng: np.random.Generator
) -> None:
    """Fill a layer's caches (num_blocks, n_kv_heads, block_size, head_dim) with noise, in place."""
    num_blocks, n_kv_heads, block_size, head_dim = key_cache.shape
    count = min(_BLOCKS, num_blocks)
    rows = noise((2, count * block_size, n_kv_heads, head_dim), "float32", rng)
    slots = np.arange(count * block_size, dtype=np.int32)
    ops.reshape_and_cache(*rows, key_cache, value_cache, slots)
    for cache in (key_cache, value_cache):
        stored = cache.payload if isinstance(cache, Quantized) else cache
        stored = stored.reshape(num_blocks, -1)
        for begin in range(count, num_blocks, count):
            stored[begin : begin + count] = stored[: min(count, num_blocks - begin)]
