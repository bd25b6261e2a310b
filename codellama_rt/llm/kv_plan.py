"""How many blocks of the KV cache to map: as many as are of use, as far as the memory goes."""

from __future__ import annotations

import contextlib

from codellama_rt.llm.memory import available_bytes, parse_bytes
from codellama_rt.llm.plan import Plan
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.ops import native
from codellama_rt.ops.quantized import CACHE_DTYPES

MEMORY_SHARE = 0.8  # of what the weights leave; the rest is for activations and the caller
REQUIRED_SHARE = 0.95  # of it, when one sequence of the length that was asked for takes as much
CUDA_MEMORY_SHARE = 0.9  # of what is free beside the weights; the rest: activations, graphs


def plan_num_blocks(config: ModelConfig, plan: Plan, weight_bytes: int) -> int:
    """Return how many blocks to map: what the sequences can use, as far as memory goes.

    Without `plan.kv_memory` that is at most 80 % of the memory that the weights leave, or 95 %
    where one sequence of `plan.max_model_len` tokens takes as much.

    Args:
        config: of the model.
        plan: its kv_dtype settled.
        weight_bytes: memory that the weights will still take: those mapped and not yet read.

    Raises:
        RuntimeError: `plan.max_model_len` tokens do not fit; the message says what would.
    """
    block_bytes = bytes_per_token(config, plan.kv_dtype) * plan.block_size
    if plan.kv_memory is None:
        free = available_bytes() - weight_bytes
        most, usual = int(REQUIRED_SHARE * free), int(MEMORY_SHARE * free)
    else:
        most = parse_bytes(plan.kv_memory)
    required = -(-(plan.max_model_len or 1) // plan.block_size)
    if required * block_bytes > most:
        raise RuntimeError(_too_little(config, plan, most))
    if plan.kv_memory is not None:
        return most // block_bytes
    return max(required, min(usual // block_bytes, _useful_blocks(config, plan)))


def _useful_blocks(config: ModelConfig, plan: Plan) -> int:
    """As many as all sequences fill together."""
    longest = plan.max_model_len or config.max_position_embeddings
    return -(-longest // plan.block_size) * plan.max_num_seqs


def _too_little(config: ModelConfig, plan: Plan, most: int) -> str:
    """Return a message that says what is missing, and every remedy."""
    dtype, block_size = plan.kv_dtype, plan.block_size
    tokens = plan.max_model_len or block_size
    blocks = -(-tokens // block_size)
    block_bytes = {dtype: bytes_per_token(config, dtype) * block_size}
    for other in CACHE_DTYPES:
        with contextlib.suppress(ValueError):  # heads that int4 cannot hold
            block_bytes[other] = bytes_per_token(config, other) * block_size
    ways = [
        f"use kv_dtype={other!r}, which takes {blocks * size / 1e9:.2f} GB"
        for other, size in block_bytes.items()
        if blocks * size <= most and size < block_bytes[dtype]
    ]
    fitting = max(most, 0) // block_bytes[dtype] * block_size
    ways.append(f"lower max_model_len to {fitting}" if fitting else "lower max_model_len")
    return (
        f"the KV cache of {tokens} tokens takes {blocks * block_bytes[dtype] / 1e9:.2f} GB in "
        f"{dtype}, and there are {max(most, 0) / 1e9:.2f} GB for it; {', '.join(ways)} or raise "
        "kv_memory"
    )


def plan_cuda_blocks(config: ModelConfig, plan: Plan, row_bytes: int) -> int:
    """Return how many blocks to allocate, once the weights are on the device.

    Args:
        config: of the model.
        plan: its kv_dtype settled; without kv_memory most of the memory that is free is taken.
        row_bytes: bytes of one token's keys (or values) in one head of one layer.

    Raises:
        RuntimeError: `plan.max_model_len` tokens do not fit.
    """
    block_bytes = 2 * config.n_layers * config.n_kv_heads * row_bytes * plan.block_size
    if plan.kv_memory is None:
        budget = int(CUDA_MEMORY_SHARE * native.cuda().memory_info()[0])
    else:
        budget = parse_bytes(plan.kv_memory)
    required = -(-(plan.max_model_len or 1) // plan.block_size)
    if budget // block_bytes < required:
        raise RuntimeError(
            f"the KV cache of {plan.max_model_len or plan.block_size} tokens takes "
            f"{required * block_bytes / 1e9:.2f} GB in {plan.kv_dtype}, and the device has "
            f"{budget / 1e9:.2f} GB for it; lower max_model_len, or ask for kv_dtype='fp8'"
        )
    if plan.kv_memory is not None:
        return budget // block_bytes
    return min(budget // block_bytes, _useful_blocks(config, plan))
