"""The memory of the paged KV cache: blocks of every layer, owned by the runtime."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.native import map_huge_pages
from codellama_rt.ops.quantized import CACHE_DTYPES, Quantized, cache_row_bytes

KV_DTYPES = (*FLOAT_DTYPES, *CACHE_DTYPES)
Blocks = np.ndarray | Quantized


class KVCache:
    """Blocks of keys and values, head-major, K and V apart, a pair of arrays per layer.

    The memory is one anonymous mapping: the system commits it when it is first written, so a large
    cache costs what is used of it, and closing gives it back at once.

    Attributes:
        num_blocks: blocks per layer.
        block_size: tokens per block, a multiple of 16.
        dtype: one of `KV_DTYPES`.
        layers: n_layers pairs (key_cache, value_cache), each
            (num_blocks, n_kv_heads, block_size, head_dim); in int8 and int4 a `Quantized` whose
            payload is uint8 (num_blocks, n_kv_heads, bytes of a block of keys or of values).
    """

    in_host_memory = True

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int = 64, dtype: str = "float32"
    ) -> None:
        """Map memory for `num_blocks` blocks of `block_size` tokens in `dtype`.

        Raises:
            ValueError: a size that is not positive, block_size not a multiple of 16, an unknown
                dtype, or one that heads of this size cannot have.
            RuntimeError: the system does not provide the memory.
        """
        check_blocks(num_blocks, block_size)
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
        key_bytes, value_bytes = (
            num_blocks * config.n_kv_heads * block_size * row for row in row_bytes(config, dtype)
        )
        self.num_bytes = config.n_layers * (key_bytes + value_bytes)
        layers = _map_memory(self.num_bytes).reshape(config.n_layers, -1)
        self.layers = [
            (
                _as_cache(blocks[:key_bytes], dtype, shape),
                _as_cache(blocks[key_bytes:], dtype, shape),
            )
            for blocks in layers
        ]
        parts = [part for one in layers for part in (one[:key_bytes], one[key_bytes:])]
        self._bytes = [part.reshape(num_blocks, -1) for part in parts]

    def block_buffers(self, block_id: int) -> list[memoryview]:
        """Return the memory of a block: its keys and its values, layer after layer."""
        return [memoryview(part[block_id]) for part in self._bytes]

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy blocks source -> destination in every layer; block_pairs is (n, 2) int32."""
        for key_cache, value_cache in self.layers:
            ops.copy_blocks(key_cache, value_cache, block_pairs)

    def close(self) -> None:
        """Forget the blocks; the memory is freed with the last array that views it."""
        self.layers, self._bytes = [], []


def check_blocks(num_blocks: int, block_size: int) -> None:
    """Reject sizes that no KV cache has, on any device.

    Raises:
        ValueError: no block, or a block_size that is not a positive multiple of 16.
    """
    if num_blocks < 1 or block_size < 16 or block_size % 16:
        raise ValueError(
            "the KV cache needs num_blocks >= 1 and block_size a positive multiple of 16, "
            f"got {num_blocks} and {block_size}"
        )


def _map_memory(num_bytes: int) -> np.ndarray:
    try:
        return map_huge_pages(num_bytes)  # a token's heads lie far apart
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"no memory for a KV cache of {num_bytes / 1e9:.1f} GB ({error}); "
            "ask for less with kv_memory"
        ) from None


def _as_cache(payload: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Blocks:
    if dtype in CACHE_DTYPES:
        return Quantized(payload.reshape(*shape[:2], -1), dtype, shape)
    return payload.view(numpy_dtype(dtype)).reshape(shape)


def row_bytes(config: ModelConfig, dtype: str) -> tuple[int, int]:
    """Return the bytes of one token's key and of its value in one head, scales included.

    Raises:
        ValueError: not a dtype of a cache, or heads of this size cannot have it.
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
    """Return the bytes of keys and values that one token takes over all layers."""
    return config.n_layers * config.n_kv_heads * sum(row_bytes(config, dtype))
