"""The memory of the paged KV cache: pages of every layer, owned by the runtime."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from codellama_rt import ops
from codellama_rt.llm.memory import available_bytes, parse_bytes
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import CACHE_DTYPES, Quantized, cache_row_bytes

KV_DTYPES = (*FLOAT_DTYPES, *CACHE_DTYPES)
MEMORY_SHARE = 0.8  # of what the weights leave; the rest is for activations and the caller
REQUIRED_SHARE = 0.95  # of it, when one sequence of the length that was asked for takes as much
Pages = np.ndarray | Quantized


class KVCache:
    """Pages of keys and values, head-major, K and V apart, a pair of arrays a layer.

    The memory is one anonymous mapping: the system commits a page when it is first written, so a
    large cache costs what is used of it, and closing gives it back at once.

    Attributes:
        num_blocks: pages a layer.
        block_size: tokens a page, a multiple of 16.
        dtype: one of `KV_DTYPES`.
        layers: n_layers pairs (key_cache, value_cache), each
            (num_blocks, n_kv_heads, block_size, head_dim); in int8 and int4 a `Quantized` whose
            payload is uint8 (num_blocks, n_kv_heads, bytes of a page of keys or of values).
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int = 64, dtype: str = "float32"
    ) -> None:
        """Map memory for `num_blocks` pages of `block_size` tokens in `dtype`.

        Raises:
            ValueError: a size that is not positive, block_size not a multiple of 16, or a dtype
                that is none or that heads of this size cannot have.
            RuntimeError: the system refuses the memory.
        """
        if num_blocks < 1 or block_size < 16 or block_size % 16:
            raise ValueError(
                "the KV cache needs num_blocks >= 1 and block_size a positive multiple of 16, "
                f"got {num_blocks} and {block_size}"
            )
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
        key_bytes, value_bytes = (
            num_blocks * config.n_kv_heads * block_size * row for row in row_bytes(config, dtype)
        )
        self.num_bytes = config.n_layers * (key_bytes + value_bytes)
        layers = _map_memory(self.num_bytes).reshape(config.n_layers, -1)
        self.layers = [
            (_as_cache(pages[:key_bytes], dtype, shape), _as_cache(pages[key_bytes:], dtype, shape))
            for pages in layers
        ]

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy pages source -> destination in every layer; block_pairs is (n, 2) int32."""
        for key_cache, value_cache in self.layers:
            ops.copy_blocks(key_cache, value_cache, block_pairs)

    def close(self) -> None:
        """Forget the pages; the memory goes back with the last array that views it."""
        self.layers = []


def _map_memory(num_bytes: int) -> np.ndarray:
    try:
        # Private: what mmap shares by default gets no huge pages on most systems.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"no memory for a KV cache of {num_bytes / 1e9:.1f} GB ({error}); "
            "ask for less with kv_memory"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer TLB misses: a token's heads lie far apart
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _as_cache(payload: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Pages:
    if dtype in CACHE_DTYPES:
        return Quantized(payload.reshape(*shape[:2], -1), dtype, shape)
    return payload.view(numpy_dtype(dtype)).reshape(shape)


def row_bytes(config: ModelConfig, dtype: str) -> tuple[int, int]:
    """Bytes that one token's key and its value take in one head, scales included.

    Raises:
        ValueError: no dtype of a cache, or heads of this size cannot have it.
    """
    if dtype not in KV_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(KV_DTYPES)}, got {dtype!r}")
    if dtype not in CACHE_DTYPES:
        return (config.head_dim * numpy_dtype(dtype).itemsize,) * 2
    try:
        return cache_row_bytes(dtype, config.head_dim)
    except ValueError as error:
        raise ValueError(f"{error}; use kv_dtype='int8'") from None


def bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return config.n_layers * config.n_kv_heads * sum(row_bytes(config, dtype))


def plan_num_blocks(
    config: ModelConfig, *, kv_dtype: str, block_size: int, longest: int | None, max_num_seqs: int,
    kv_memory: int | str | None, weight_bytes: int,
) -> int:  # fmt: skip
    """How many pages to map: what max_num_seqs sequences can use, as far as memory goes.

    Args:
        config: of the model.
        kv_dtype: of the cache.
        block_size: tokens a page.
        longest: tokens of one sequence that must fit; None: none in particular.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB"; None: at most 80 % of the memory that the weights
            leave, or 95 % where one sequence of `longest` tokens takes as much.
        weight_bytes: memory that the weights will still take: those mapped and not yet read.

    Raises:
        RuntimeError: `longest` tokens do not fit; the message says what would.
    """
    page_bytes = bytes_per_token(config, kv_dtype) * block_size
    free = available_bytes() - weight_bytes if kv_memory is None else parse_bytes(kv_memory)
    most = free if kv_memory is not None else int(REQUIRED_SHARE * free)
    required = -(-(longest or 1) // block_size)
    if required * page_bytes > most:
        raise RuntimeError(_too_little(config, kv_dtype, block_size, longest or block_size, most))
    if kv_memory is not None:
        return free // page_bytes
    usual = -(-(longest or config.max_position_embeddings) // block_size) * max_num_seqs
    return max(required, min(int(MEMORY_SHARE * free) // page_bytes, usual))


def _too_little(config: ModelConfig, dtype: str, block_size: int, tokens: int, most: int) -> str:
    """What is missing, and every way out that is one."""
    pages = -(-tokens // block_size)
    page_bytes = {dtype: bytes_per_token(config, dtype) * block_size}
    for other in CACHE_DTYPES:
        with contextlib.suppress(ValueError):  # heads that int4 cannot hold
            page_bytes[other] = bytes_per_token(config, other) * block_size
    ways = [
        f"use kv_dtype={other!r}, which takes {pages * size / 1e9:.2f} GB"
        for other, size in page_bytes.items()
        if pages * size <= most and size < page_bytes[dtype]
    ]
    fitting = max(most, 0) // page_bytes[dtype] * block_size
    ways.append(f"lower max_model_len to {fitting}" if fitting else "lower max_model_len")
    return (
        f"the KV cache of {tokens} tokens takes {pages * page_bytes[dtype] / 1e9:.2f} GB in "
        f"{dtype}, and there are {max(most, 0) / 1e9:.2f} GB for it; {', '.join(ways)} or raise "
        "kv_memory"
    )
