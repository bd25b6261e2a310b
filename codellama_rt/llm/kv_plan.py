"""How many blocks of the KV cache to map: as many as are of use, as far as the memory goes."""

from __future__ import annotations

import contextlib

from codellama_rt.llm.memory import available_bytes, parse_bytes
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.ops import native
from codellama_rt.ops.quantized import CACHE_DTYPES

MEMORY_SHARE = 0.8  # of what the weights leave; the rest is for activations and the caller
REQUIRED_SHARE = 0.95  # of it, when one sequence of the length that was asked for takes as much
CUDA_MEMORY_SHARE = 0.9  # of what is free beside the weights; the rest: activations, graphs


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


def plan_cuda_blocks(
    config: ModelConfig,
    dtype: str,
    block_size: int,
    row_bytes: int,
    *,
    longest: int | None,
    max_num_seqs: int,
    kv_memory: int | str | None,
) -> int:
    """How many pages to allocate, once the weights are on the device.

    Args:
        config: of the model.
        dtype: of the cache.
        block_size: tokens per block.
        row_bytes: bytes of one token's keys (or values) in one head of one layer.
        longest: tokens of one sequence that must fit; None: none in particular.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB"; None: most of the memory that is free.

    Raises:
        RuntimeError: `longest` tokens do not fit.
    """
    page_bytes = 2 * config.n_layers * config.n_kv_heads * row_bytes * block_size
    free = native.cuda().memory_info()[0]
    budget = int(CUDA_MEMORY_SHARE * free) if kv_memory is None else parse_bytes(kv_memory)
    required = -(-(longest or 1) // block_size)
    if budget // page_bytes < required:
        raise RuntimeError(
            f"the KV cache of {longest or block_size} tokens takes "
            f"{required * page_bytes / 1e9:.2f} GB in {dtype}, and the device has "
            f"{budget / 1e9:.2f} GB for it; lower max_model_len, or ask for kv_dtype='fp8'"
        )
    if kv_memory is not None:
        return budget // page_bytes
    usual = -(-(longest or config.max_position_embeddings) // block_size)
    return min(budget // page_bytes, usual * max_num_seqs)
