"""The model and the KV cache of a device."""

from __future__ import annotations

from typing import Any

from codellama_rt.checkpoint import LlamaWeights
from codellama_rt.config import ModelConfig
from codellama_rt.kv_cache import KVCache
from codellama_rt.model import Llama


def make_model(
    device: str, config: ModelConfig, weights: LlamaWeights, attention: str = "custom"
) -> Any:
    """The decoder on "cpu" or "ascend"; `attention` chooses among Ascend's kernels.

    Raises:
        ValueError: weights or an attention that the device does not have.
    """
    if device == "ascend":
        from codellama_rt.ascend_model import AscendLlama

        return AscendLlama(config, weights, attention=attention)
    if attention != "custom":
        raise ValueError(f"attention={attention!r} is there on Ascend, not on device {device!r}")
    return Llama(config, weights)


def make_kv_cache(model: Any, **sizes: Any) -> Any:
    """Pages where the model's kernels want them; `sizes` as `KVCache` takes them."""
    return getattr(model, "kv_cache_type", KVCache)(model.config, **sizes)
