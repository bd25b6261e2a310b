"""What callers give an LLM, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from codellama_rt import ops
from codellama_rt.checkpoint.quantize import check_quantization
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.kv_cache import KV_DTYPES

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return a list of prompts from one or several, and whether it was one.

    Raises:
        TypeError: neither str nor token ids nor a dictionary of either, nor a list of them.
        ValueError: a dictionary with other entries.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompt_content(prompts)], True
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts are a str, token ids or a list of these, got {type(prompts).__name__}"
        )
    items = [prompt_content(prompt) for prompt in prompts]
    if items and not isinstance(items[0], str) and not hasattr(items[0], "__len__"):
        return [items], True
    return items, False


def prompt_content(prompt: Any) -> Any:
    """Return the str or the token ids of a prompt that is a dictionary, as vLLM takes them."""
    if not isinstance(prompt, Mapping):
        return prompt
    for name, kind in (("prompt", str), ("prompt_token_ids", Iterable)):
        if set(prompt) == {name}:
            value = prompt[name]
            if isinstance(value, kind) and (kind is str or not isinstance(value, (str, Mapping))):
                return value
            raise TypeError(
                f"a prompt's entry {name!r} is of a wrong type, got {type(value).__name__}"
            )
    raise ValueError(
        "a prompt that is a dictionary has one entry, 'prompt' or 'prompt_token_ids', got "
        f"{sorted(map(str, prompt))!r:.100}"
    )


def only_one(
    params: SamplingParams | Sequence[SamplingParams] | None,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
) -> SamplingParams | Sequence[SamplingParams] | None:
    """Return the parameters that were given under one of their two names.

    Raises:
        TypeError: both are given.
    """
    if params is not None and sampling_params is not None:
        raise TypeError("params and sampling_params are two names of one argument; give one")
    return sampling_params if params is None else params


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
