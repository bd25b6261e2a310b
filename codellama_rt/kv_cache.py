"""The memory of the paged KV cache: pages of every layer, owned by the runtime."""

from __future__ import annotations

import mmap

import numpy as np

from codellama_rt import ops
from codellama_rt.config import ModelConfig
from codellama_rt.dtypes import numpy_dtype
from codellama_rt.memory import available_bytes, parse_bytes

MEMORY_SHARE = 0.8  # of what the weights leave; the rest is for activations and the caller


class KVCache:
    """Pages of keys and values, head-major, K and V apart, a pair of arrays a layer.

    The memory is one anonymous mapping: the system commits a page when it is first written, so a
    large cache costs what is used of it, and closing gives it back at once.

    Attributes:
        num_blocks: pages a layer.
        block_size: tokens a page, a multiple of 16.
        layers: n_layers pairs (key_cache, value_cache), each
            (num_blocks, n_kv_heads, block_size, head_dim).
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int = 64, dtype: str = "float32"
    ) -> None:
        """Map memory for `num_blocks` pages of `block_size` tokens in `dtype`.

        Raises:
            ValueError: a size that is not positive, or block_size not a multiple of 16.
            RuntimeError: the system refuses the memory.
        """
        if num_blocks < 1 or block_size < 16 or block_size % 16:
            raise ValueError(
                "the KV cache needs num_blocks >= 1 and block_size a positive multiple of 16, "
                f"got {num_blocks} and {block_size}"
            )
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
        element = numpy_dtype(dtype)
        bytes_each = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        self.num_bytes = 2 * config.n_layers * bytes_each
        try:
            memory = mmap.mmap(-1, self.num_bytes)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"no memory for a KV cache of {self.num_bytes / 1e9:.1f} GB ({error}); "
                "ask for less with kv_memory"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer TLB misses: a token's heads lie far apart
            memory.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(memory, element).reshape(config.n_layers, 2, *shape)
        self.layers = [(keys, values) for keys, values in pages]

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy pages source -> destination in every layer; block_pairs is (n, 2) int32."""
        for key_cache, value_cache in self.layers:
            ops.copy_blocks(key_cache, value_cache, block_pairs)

    def close(self) -> None:
        """Forget the pages; the memory goes back with the last array that views it."""
        self.layers = []


def bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * numpy_dtype(dtype).itemsize


def plan_num_blocks(
    config: ModelConfig, dtype: str, block_size: int, *, longest: int | None, max_num_seqs: int,
    kv_memory: int | str | None, weight_bytes: int,
) -> int:  # fmt: skip
    """How many pages to map: what max_num_seqs sequences can use, as far as memory goes.

    Args:
        config: of the model.
        dtype: of the cache.
        block_size: tokens a page.
        longest: tokens of one sequence that must fit; None: none in particular.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB"; None: a share of the free memory.
        weight_bytes: memory that the weights will take of it.

    Raises:
        RuntimeError: `longest` tokens do not fit.
    """
    page_bytes = bytes_per_token(config, dtype) * block_size
    if kv_memory is None:
        budget = int(MEMORY_SHARE * (available_bytes() - weight_bytes))
    else:
        budget = parse_bytes(kv_memory)
    required = -(-(longest or 1) // block_size)
    num_blocks = budget // page_bytes
    if num_blocks < required:
        raise RuntimeError(
            f"the KV cache of {longest or block_size} tokens takes "
            f"{required * page_bytes / 1e9:.2f} GB in {dtype}, and there are "
            f"{max(budget, 0) / 1e9:.2f} GB for it; lower max_model_len or raise kv_memory"
        )
    if kv_memory is not None:
        return num_blocks
    usual = -(-(longest or config.max_position_embeddings) // block_size)
    return min(num_blocks, usual * max_num_seqs)
