"""What keys and values depend on beside tokens: kernels, arithmetic, shape, weights, adapter.

Those that are kept on disk are used again only where each bit would be computed the same.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from codellama_rt.model.config import ModelConfig
from codellama_rt.model.lora import LoraAdapter
from codellama_rt.model.weights import LlamaWeights
from codellama_rt.ops import native
from codellama_rt.ops.quantized import Quantized

_DIGEST_BYTES = 16
_WHOLE_BYTES = 2**16  # up to this size every byte of a weight is read
_NUM_SAMPLES, _SAMPLE_BYTES = 8, 4096  # of a larger one: a page each, from its first to its last
_adapter_digests: weakref.WeakKeyDictionary[LoraAdapter, str] = weakref.WeakKeyDictionary()


def fingerprint(
    config: ModelConfig, weights: LlamaWeights, *, kv_dtype: str, block_size: int
) -> dict[str, str]:
    """Return what the bits of keys and values depend on beside tokens and instruction set, by name.

    Of large weights some pages are read, 32 KiB of each; the rest is not.

    Args:
        config: of the model.
        weights: as the kernels read them: quantised, repacked, with adapters merged into them.
        kv_dtype: of the keys and values.
        block_size: tokens per block, which their layout depends on.
    """
    return {
        "kv_dtype": kv_dtype,
        "block_size": str(block_size),
        "kernels": native.build_digest(),
        "arithmetic": _arithmetic_digest(),
        "config": _digest([repr(config).encode()]),
        "weights": _digest(part for name, one in _named(weights) for part in _parts(name, one)),
    }


def adapter_digest(adapter: LoraAdapter) -> str:
    """Return a digest of all bytes of an adapter; a second call for it costs nothing."""
    known = _adapter_digests.get(adapter)
    if known is None:
        known = _digest(_adapter_parts(adapter))
        _adapter_digests[adapter] = known
    return known


def _digest(parts: Any) -> str:
    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _arithmetic_digest() -> str:
    """Return a digest of what NumPy and libm give here: both differ between kinds of CPU."""
    angles = np.arange(8192, dtype=np.float64) * 1.37
    powers = np.float64(1e6) ** np.linspace(0.0, 1.0, 512)
    exponentials = np.array([math.exp(-x / 97) for x in range(2048)])
    return _digest(
        array.tobytes() for array in (np.cos(angles), np.sin(angles), powers, exponentials)
    )


def _named(weights: LlamaWeights) -> Iterator[tuple[str, Any]]:
    for name in ("embedding", "norm", "lm_head"):
        yield name, getattr(weights, name)
    for i, layer in enumerate(weights.layers):
        for field in fields(layer):
            yield f"{i}.{field.name}", getattr(layer, field.name)
    for i, biases in enumerate(weights.biases):
        for name, bias in sorted(biases.items()):
            yield f"{i}.{name}.bias", bias


def _parts(name: str, weight: Any) -> Iterator[Any]:
    """Return a weight's name and shape, and some of its contents."""
    yield f"{name} {weight.dtype} {tuple(weight.shape)};".encode()
    contents = _as_bytes(weight.payload if isinstance(weight, Quantized) else weight)
    if len(contents) <= _WHOLE_BYTES:
        yield contents
        return
    for start in np.linspace(0, len(contents) - _SAMPLE_BYTES, _NUM_SAMPLES, dtype=np.int64):
        yield contents[start : start + _SAMPLE_BYTES]


def _adapter_parts(adapter: LoraAdapter) -> Iterator[Any]:
    changes = {f"top.{name}": change for name, change in adapter.top.items()}
    for i, layer in enumerate(adapter.layers):
        changes |= {f"{i}.{name}": change for name, change in layer.items()}
    arrays = {
        f"{name}.{field.name}": getattr(change, field.name)
        for name, change in changes.items()
        for field in fields(change)
    }
    arrays |= {f"whole.{layer}.{name}": array for (layer, name), array in adapter.whole.items()}
    if adapter.tokens is not None:
        arrays |= {"tokens.ids": adapter.tokens.ids, "tokens.values": adapter.tokens.values}
    yield f"tied {adapter.tied};".encode()
    for name, array in sorted(arrays.items()):
        if array is not None:
            yield f"{name} {array.dtype} {array.shape};".encode()
            yield _as_bytes(array)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
