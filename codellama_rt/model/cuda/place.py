"""Put a checkpoint's weights and a KV cache on the device, for LLM to run there."""

from __future__ import annotations

from codellama_rt.checkpoint import LlamaWeights
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.cuda.kv_cache import DeviceKVCache, plan_num_blocks, require_kv_dtype
from codellama_rt.model.cuda.llama import DeviceLlama, workspace_bytes
from codellama_rt.model.cuda.weights import upload


def place(
    config: ModelConfig,
    weights: LlamaWeights,
    *,
    kv_dtype: str,
    block_size: int,
    longest: int | None,
    max_num_seqs: int,
    kv_memory: int | str | None,
    quantization: str | None = None,
) -> tuple[DeviceLlama, DeviceKVCache]:
    """Return the model and its cache, with the interface that Engine expects.

    Args:
        config: of the model.
        weights: in host memory.
        kv_dtype: of the cache: "float16", "bfloat16", "float32", "int8" or "fp8".
        block_size: tokens per block.
        longest: tokens of one sequence that must fit; None: no minimum.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB"; None: most of what the weights leave free.
        quantization: None, "int8" or "int4", for the layers' projections.

    Raises:
        ValueError: a dtype without kernels for the device.
        RuntimeError: not enough device memory.
    """
    require_kv_dtype(kv_dtype)
    model = DeviceLlama(config, upload(weights, quantization))
    num_blocks = plan_num_blocks(
        config,
        kv_dtype,
        block_size,
        longest=longest,
        max_num_seqs=max_num_seqs,
        kv_memory=kv_memory,
    )
    cache = DeviceKVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    model.lend_workspace(workspace_bytes(config, num_blocks * block_size, max_num_seqs))
    return model, cache
