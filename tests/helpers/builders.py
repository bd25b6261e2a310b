"""Arrays, blocks, RoPE tables and small models that several tests are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import (
    CACHE_DTYPES,
    GGUF_BLOCKS,
    GGUF_HALVES,
    OWN_WEIGHT_DTYPES,
    TILED,
    TILED_DTYPES,
    Quantized,
    empty_caches,
)

GARBAGE_BLOCKS = (-1, -7, 2**31 - 1)  # what an unused entry of a block table may hold
ACTIVATION_AND_STORED = [(a, b) for a in FLOAT_DTYPES for b in FLOAT_DTYPES]
ACTIVATION_AND_CACHED = [(a, b) for a in FLOAT_DTYPES for b in (*FLOAT_DTYPES, *CACHE_DTYPES)]


@contextmanager
def running_on(isa: str | None = None, num_threads: int | None = None) -> Iterator[None]:
    """An instruction set and a number of threads for a while; those of before come back."""
    before = ops.isa(), ops.num_threads()
    ops.set_isa(isa or before[0])
    ops.set_num_threads(num_threads or before[1])
    try:
        yield
    finally:
        ops.set_isa(before[0])
        ops.set_num_threads(before[1])


def normal(rng: np.random.Generator, shape, dtype: str = "float32", scale: float = 1.0):
    """Normally distributed numbers, rounded to `dtype`."""
    return (scale * rng.standard_normal(shape, np.float32)).astype(numpy_dtype(dtype))


def quantized_weight(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> ops.Quantized:
    """A weight in any quantised format: of normal numbers, or valid blocks of random bits."""
    if dtype in OWN_WEIGHT_DTYPES:
        return ops.quantize(normal(rng, shape), dtype)
    if dtype in TILED_DTYPES:
        return ops.repack(quantized_weight(rng, shape, dtype.removesuffix(TILED)))
    rows, k = shape
    elements, num_bytes = GGUF_BLOCKS[dtype]
    blocks = rng.integers(0, 256, (rows, k // elements, num_bytes), np.uint8)
    for offset in GGUF_HALVES[dtype]:
        scales = (0.02 * rng.standard_normal((rows, k // elements, 1))).astype(np.float16)
        blocks[..., offset : offset + 2] = scales.view(np.uint8)
    return ops.Quantized(blocks.reshape(rows, -1), dtype, shape)


def int32(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def ends(counts) -> np.ndarray:
    """(num_seqs + 1) int32: where each of consecutive runs begins, and the total."""
    return int32(np.concatenate([[0], np.cumsum(counts)]))


def rope_tables(num_positions: int, head_dim: int, theta: float = 1e6):
    """Cosines and sines of the positions, float32 (num_positions, head_dim / 2)."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(num_positions)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Paged:
    """Arguments of paged_attention, and the same keys and values one after another."""

    query: np.ndarray  # (num_tokens, n_heads, head_dim)
    key_cache: np.ndarray | Quantized  # (num_blocks, n_kv_heads, block_size, head_dim)
    value_cache: np.ndarray | Quantized
    block_tables: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray
    key: np.ndarray  # (sum of seq_lens, n_kv_heads, head_dim)
    value: np.ndarray

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        return (
            self.query, self.key_cache, self.value_cache, self.block_tables, self.seq_lens,
            self.cu_seqlens_q,
        )  # fmt: skip

    @property
    def contiguous(self) -> tuple[np.ndarray, ...]:
        """Arguments of flash_attention."""
        return self.query, self.key, self.value, self.cu_seqlens_q, ends(self.seq_lens)

    def repaged(self, rng: np.random.Generator, block_size: int) -> Paged:
        """The same numbers in blocks of another size and at other places."""
        cache_dtype = str(self.key_cache.dtype)
        pages = _lay_out(rng, self.key, self.value, self.seq_lens, block_size, cache_dtype)
        return replace(self, **pages)

    def with_token(self, at: int, key: np.ndarray, value: np.ndarray) -> Paged:
        """Other keys and values (n_kv_heads, head_dim) at token `at` of the first sequence."""
        caches = [cache.copy() for cache in (self.key_cache, self.value_cache)]
        block_size = self.key_cache.shape[2]
        slot = self.block_tables[0, at // block_size] * block_size + at % block_size
        ops.reshape_and_cache(key[None], value[None], *caches, int32([slot]))
        return replace(self, key_cache=caches[0], value_cache=caches[1])


def paged(
    rng: np.random.Generator, seq_lens, num_queries, *, heads=(4, 2), head_dim: int = 64,
    block_size: int = 16, dtype: str = "float32", cache_dtype: str = "float32",
) -> Paged:  # fmt: skip
    """Random sequences; whatever the op must not read is NaN or garbage.

    Args:
        rng: source of everything.
        seq_lens: keys of each sequence.
        num_queries: how many of the last keys of each sequence have queries.
        heads: (n_heads, n_kv_heads).
        head_dim: of all heads.
        block_size: tokens per block.
        dtype: of the queries.
        cache_dtype: of keys and values; quantised ones are written by `reshape_and_cache`, which
            has tests of its own.
    """
    n_heads, n_kv_heads = heads
    total = int(np.sum(seq_lens))
    query = normal(rng, (int(np.sum(num_queries)), n_heads, head_dim), dtype)
    element = "float32" if cache_dtype in CACHE_DTYPES else cache_dtype
    key = normal(rng, (total, n_kv_heads, head_dim), element)
    value = normal(rng, (total, n_kv_heads, head_dim), element)
    return Paged(
        query=query, key=key, value=value, seq_lens=int32(seq_lens),
        cu_seqlens_q=ends(num_queries),
        **_lay_out(rng, key, value, seq_lens, block_size, cache_dtype),
    )  # fmt: skip


def unwritten_caches(shape, dtype: str) -> list[np.ndarray] | list[Quantized]:
    """Blocks of keys and of values in which every number, or scale, is NaN."""
    if dtype not in CACHE_DTYPES:
        return [np.full(shape, np.nan, numpy_dtype(dtype)) for _ in range(2)]
    caches = empty_caches(dtype, shape)
    for cache in caches:
        cache.payload.fill(0xFF)
    return list(caches)


def quantized_caches(dtype: str, shape, make=np.empty) -> list[Quantized]:
    """As `unwritten_caches`, in memory that `make(shape, dtype)` gives."""
    caches = unwritten_caches(shape, dtype)
    for i, cache in enumerate(caches):
        payload = make(cache.payload.shape, "uint8")
        payload[...] = cache.payload
        caches[i] = replace(cache, payload=payload)
    return caches


def _lay_out(rng, key, value, seq_lens, block_size, cache_dtype) -> dict:
    counts = [-(-int(length) // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 3
    caches = unwritten_caches((num_blocks, key.shape[1], block_size, key.shape[2]), cache_dtype)
    table = int32(rng.choice(GARBAGE_BLOCKS, (len(counts), max(counts, default=0) + 1)))
    free = iter(rng.permutation(num_blocks))
    slots = []
    for row, length, count in zip(table, seq_lens, counts, strict=True):
        row[:count] = [next(free) for _ in range(count)]
        tokens = np.arange(length)
        slots.append(row[tokens // block_size] * block_size + tokens % block_size)
    slots = np.concatenate([*slots, int32([])])
    if cache_dtype in CACHE_DTYPES:
        ops.reshape_and_cache(key, value, *caches, int32(slots))
    else:
        for cache, rows in zip(caches, (key, value), strict=True):
            cache[slots // block_size, :, slots % block_size] = rows
    return {"key_cache": caches[0], "value_cache": caches[1], "block_tables": table}
