"""What callers give an LLM, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from codellama_rt import ops
from codellama_rt.checkpoint.quantize import check_quantization
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.kv_cache import KV_DTYPES

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return a list of prompts from one or several, and whether it was one.

    Raises:
        TypeError: neither str nor token ids nor a list of them.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts are a str, token ids or a list of these, got {type(prompts).__name__}"
        )
    items = list(prompts)
    if items and not isinstance(items[0], str) and not hasattr(items[0], "__len__"):
        return [items], True
    return items, False


def require_options(
    device: str, kv_dtype: str, quantization: str | None, **counts: int | None
) -> None:
    """Refuse options that no model could be opened with.

    Raises:
        ValueError, TypeError: an unknown dtype, or a count that is not a positive int.
        RuntimeError: no such device here.
    """
    require_device(device)
    if device != "cuda":  # its cache has its own dtypes, and place() rejects others
        require_dtype(kv_dtype)
    check_quantization(quantization)
    require_counts(**counts)


def require_device(device: str) -> None:
    """Refuse a device that this build or machine does not have, and name what it has."""
    usable, reason = ops.available(device)
    if not usable:
        raise RuntimeError(f"device {device!r} cannot be used: {reason}")


def require_dtype(kv_dtype: str) -> None:
    """Refuse a dtype that the KV cache cannot have."""
    if kv_dtype not in ("auto", *KV_DTYPES):
        raise ValueError(f"kv_dtype must be one of auto, {', '.join(KV_DTYPES)}, got {kv_dtype!r}")


def require_counts(**counts: int | None) -> None:
    """Refuse options that are given and no positive int."""
    for name, count in counts.items():
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def default_params(config: Mapping[str, Any]) -> SamplingParams:
    """Greedy, or what a checkpoint's generation_config.json says."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample"):
        given.setdefault("temperature", 1.0)
    else:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            given.pop(name, None)
    if config.get("max_new_tokens"):
        given["max_tokens"] = config["max_new_tokens"]
    return SamplingParams(**given)
