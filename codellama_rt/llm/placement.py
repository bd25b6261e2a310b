"""The model and the KV cache of a device; each device's own modules are imported when asked for."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec
from typing import Any, NamedTuple

from codellama_rt.llm.kv_plan import plan_cuda_blocks
from codellama_rt.llm.plan import Plan
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.model.weights import LlamaWeights

RUNTIMES = ("direct", "graph")
MINDSPORE_SETTINGS, NO_PIPELINE = "MS_DEV_RUNTIME_CONF", "graph_pipeline:false"


class Placed(NamedTuple):
    """A decoder and its KV cache, on one device, with the engine's interface."""

    model: Decoder
    cache: KVCache


def default_block_size(device: str) -> int:
    """Return the tokens per block: Huawei's attention wants 128, smaller ones share more."""
    return 128 if device == "ascend" else 64


def place(plan: Plan, config: ModelConfig, weights: LlamaWeights) -> Placed:
    """Place the decoder and its KV cache on a device.

    Args:
        plan: settled.
        config: of the model.
        weights: on the host; quantised as planned, except that "cuda" quantises as it takes them.

    Raises:
        ValueError: weights, dtypes, an attention or a runtime that the device does not have, or a
            sequence of `plan.max_model_len` tokens that the attention cannot reach.
        RuntimeError: not the memory.
    """
    device, num_blocks = plan.device, plan.num_blocks
    if plan.attention != "custom" and device != "ascend":
        raise ValueError(
            f"attention={plan.attention!r} is there on Ascend, not on device {device!r}"
        )
    require_no_biases(config, device)
    if device == "cuda":
        return _place_on_cuda(plan, config, weights)
    if plan.attention == "vendor":
        num_blocks = _within_offsets(config, plan)
    model = make_model(device, config, weights, plan.attention, plan.runtime)
    cache = make_kv_cache(
        model, num_blocks=num_blocks, block_size=plan.block_size, dtype=plan.kv_dtype
    )
    return Placed(model, cache)


def require_runtime(runtime: str, device: str) -> None:
    """Reject a runtime that the device or this installation does not have.

    Raises:
        ValueError: not "direct" or "graph", or "graph" on another device than the CPU.
        RuntimeError: "graph" without MindSpore.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if runtime == "graph" and device != "cpu":
        raise ValueError(
            f"runtime='graph' is supported on device 'cpu' only, got device {device!r}; "
            "use runtime='direct'"
        )
    if runtime == "graph" and find_spec("mindspore") is None:
        raise RuntimeError(
            "runtime='graph' needs MindSpore, which is not installed: pip install mindspore, "
            "or use runtime='direct'"
        )


def require_no_biases(config: ModelConfig, device: str) -> None:
    """Reject a model whose projections have biases, unless it is for the CPU.

    Raises:
        ValueError: as said.
    """
    if config.biased and device != "cpu":
        raise ValueError(
            f"projections with biases ({', '.join(config.biased)}) are supported on device 'cpu' "
            f"only, got device {device!r}"
        )


def make_model(
    device: str,
    config: ModelConfig,
    weights: LlamaWeights,
    attention: str = "custom",
    runtime: str = "direct",
) -> Decoder:
    """Make the decoder on "cpu" or "ascend".

    Args:
        device: where.
        config: of the model.
        weights: on the host.
        attention: chooses among Ascend's kernels.
        runtime: "direct" calls of the kernels, or on the CPU a "graph" of MindSpore.

    Raises:
        ValueError, RuntimeError: as `require_runtime`.
    """
    require_runtime(runtime, device)
    if runtime == "graph":
        _keep_the_pipeline_off()
        from codellama_rt.model.llama_graph import LlamaCell

        return LlamaCell(config, weights)
    if device == "ascend":
        from codellama_rt.model.ascend.llama import AscendLlama

        return AscendLlama(config, weights, attention=attention)
    return Llama(config, weights)


def _keep_the_pipeline_off() -> None:
    """Have MindSpore run graphs in the calling thread; it reads the setting when it is imported.

    Its pipeline's threads take the cores from the kernels: a step may take ten times as long.
    """
    settings = os.environ.get(MINDSPORE_SETTINGS, "")
    if "graph_pipeline" in settings:
        return
    if "mindspore" in sys.modules:
        warnings.warn(
            f"MindSpore is imported already; for fast steps with runtime='graph' set "
            f"{MINDSPORE_SETTINGS}={NO_PIPELINE} in the environment before it is imported",
            stacklevel=2,
        )
    else:
        os.environ[MINDSPORE_SETTINGS] = ",".join(filter(None, [settings, NO_PIPELINE]))


def make_kv_cache(model: Decoder, **sizes: Any) -> KVCache:
    """Make the cache where the model's kernels want it; `sizes` as `KVCache` takes them."""
    return model.kv_cache_type(model.config, **sizes)


def _within_offsets(config: ModelConfig, plan: Plan) -> int:
    """Return as many of the blocks as the 32-bit offsets of CANN's attention reach."""
    from codellama_rt.model.ascend.vendor import MAX_ELEMENTS

    most = MAX_ELEMENTS // (config.n_kv_heads * plan.block_size * config.head_dim)
    longest = plan.max_model_len or plan.block_size
    if longest > most * plan.block_size:
        raise ValueError(
            f"attention='vendor' reaches {most * plan.block_size} tokens of this model's cache "
            f"({MAX_ELEMENTS} elements), not max_model_len={longest}; use attention='custom'"
        )
    return min(plan.num_blocks, most)


def _place_on_cuda(plan: Plan, config: ModelConfig, weights: LlamaWeights) -> Placed:
    """Upload the weights first: the cache gets what they leave of the device's memory."""
    from codellama_rt.model.cuda.kv_cache import DeviceKVCache, require_kv_dtype, row_bytes
    from codellama_rt.model.cuda.llama import DeviceLlama, workspace_bytes
    from codellama_rt.model.cuda.weights import upload

    dtype, block_size = plan.kv_dtype, plan.block_size
    require_kv_dtype(dtype)
    model = DeviceLlama(config, upload(weights, plan.quantization))
    num_blocks = plan_cuda_blocks(config, plan, row_bytes(config, dtype))
    cache = DeviceKVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=dtype)
    model.lend_workspace(workspace_bytes(config, num_blocks * block_size, plan.max_num_seqs))
    return Placed(model, cache)
