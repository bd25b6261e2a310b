"""The model and the KV cache of a device; each device's own modules are imported when asked for."""

from __future__ import annotations

from typing import Any

from codellama_rt.checkpoint.stored_tensor import StoredModel
from codellama_rt.llm.kv_plan import plan_cuda_blocks, plan_num_blocks
from codellama_rt.llm.memory import available_bytes
from codellama_rt.llm.memory_plan import estimate, require_memory
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.model.weights import LlamaWeights


def default_block_size(device: str) -> int:
    """Tokens of a KV page; Huawei's attention wants 128, elsewhere smaller ones share more."""
    return 128 if device == "ascend" else 64


def plan_pages(
    device: str, stored: StoredModel, dtype: str, quantization: str | None,
    max_num_batched_tokens: int, **pages: Any,
) -> int | None:  # fmt: skip
    """How many pages the host's memory allows, from a model's headers alone.

    Args:
        device: where; "cuda" has a memory of its own, which is asked when the weights are in it.
        stored: from `read_model`.
        dtype: as in `LLM`.
        quantization: as in `LLM`.
        max_num_batched_tokens: as in `LLM`.
        pages: kv_dtype, block_size, longest, max_num_seqs and kv_memory, as `place` takes them.

    Returns:
        Their number; None for "cuda".

    Raises:
        RuntimeError: the weights do not fit, or not `longest` tokens beside them.
    """
    if device == "cuda":
        return None
    needed = estimate(
        stored, context=1, dtype=dtype, quantization=quantization, kv_dtype=pages["kv_dtype"],
        block_size=pages["block_size"], max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip
    require_memory(needed, available_bytes())
    return plan_num_blocks(stored.config, weight_bytes=needed.weights, **pages)


def place(
    device: str, config: ModelConfig, weights: LlamaWeights, *, num_blocks: int | None,
    kv_dtype: str, block_size: int, longest: int | None, max_num_seqs: int,
    kv_memory: int | str | None, quantization: str | None, attention: str,
) -> tuple[Any, Any]:  # fmt: skip
    """The decoder on "cpu", "cuda" or "ascend" and its pages, with the engine's interface.

    Args:
        device: where.
        config: of the model.
        weights: on the host.
        num_blocks: pages, from `plan_pages`.
        kv_dtype: of the cache.
        block_size: tokens a page.
        longest: tokens of one sequence that must fit; None: none in particular.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB" for the pages; None: what the memory allows.
        quantization: of the weights as they go to "cuda"; elsewhere they come quantised.
        attention: "custom", or on Ascend "vendor".

    Raises:
        ValueError: weights, dtypes or an attention that the device does not have, or a sequence
            of `longest` tokens that the attention cannot reach.
        RuntimeError: not the memory.
    """
    if attention != "custom" and device != "ascend":
        raise ValueError(f"attention={attention!r} is there on Ascend, not on device {device!r}")
    if device == "cuda":
        return _place_on_cuda(
            config, weights, kv_dtype=kv_dtype, block_size=block_size, longest=longest,
            max_num_seqs=max_num_seqs, kv_memory=kv_memory, quantization=quantization,
        )  # fmt: skip
    if attention == "vendor":
        num_blocks = _within_offsets(config, num_blocks, block_size, longest or block_size)
    model = make_model(device, config, weights, attention)
    cache = make_kv_cache(model, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    return model, cache


def make_model(
    device: str, config: ModelConfig, weights: LlamaWeights, attention: str = "custom"
) -> Any:
    """The decoder on "cpu" or "ascend"; `attention` chooses among Ascend's kernels."""
    if device == "ascend":
        from codellama_rt.model.ascend.llama import AscendLlama

        return AscendLlama(config, weights, attention=attention)
    return Llama(config, weights)


def make_kv_cache(model: Any, **sizes: Any) -> Any:
    """Pages where the model's kernels want them; `sizes` as `KVCache` takes them."""
    return getattr(model, "kv_cache_type", KVCache)(model.config, **sizes)


def _within_offsets(config: ModelConfig, num_blocks: int, block_size: int, longest: int) -> int:
    """As many of the pages as the 32-bit offsets of CANN's attention reach."""
    from codellama_rt.model.ascend.vendor import MAX_ELEMENTS

    most = MAX_ELEMENTS // (config.n_kv_heads * block_size * config.head_dim)
    if longest > most * block_size:
        raise ValueError(
            f"attention='vendor' reaches {most * block_size} tokens of this model's cache "
            f"({MAX_ELEMENTS} elements), not max_model_len={longest}; use attention='custom'"
        )
    return min(num_blocks, most)


def _place_on_cuda(
    config: ModelConfig, weights: LlamaWeights, *, kv_dtype: str, block_size: int,
    longest: int | None, max_num_seqs: int, kv_memory: int | str | None, quantization: str | None,
) -> tuple[Any, Any]:  # fmt: skip
    """Upload the weights first: the cache gets what they leave of the device's memory."""
    from codellama_rt.model.cuda.kv_cache import DeviceKVCache, require_kv_dtype, row_bytes
    from codellama_rt.model.cuda.llama import DeviceLlama, workspace_bytes
    from codellama_rt.model.cuda.weights import upload

    require_kv_dtype(kv_dtype)
    model = DeviceLlama(config, upload(weights, quantization))
    num_blocks = plan_cuda_blocks(
        config,
        kv_dtype,
        block_size,
        row_bytes(config, kv_dtype),
        longest=longest,
        max_num_seqs=max_num_seqs,
        kv_memory=kv_memory,
    )
    cache = DeviceKVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    model.lend_workspace(workspace_bytes(config, num_blocks * block_size, max_num_seqs))
    return model, cache
