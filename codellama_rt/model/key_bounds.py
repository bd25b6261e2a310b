"""The least and the greatest key of each block of a KV cache, per layer, head and dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from codellama_rt.ops.quantized import Quantized, read_cache

_BLOCKS_AT_ONCE = 64  # whose keys are read as float32


class KeyBounds:
    """Bounds of keys, computed when they are first asked for, from the blocks as they are then."""

    def __init__(self, shape: Sequence[int], n_layers: int) -> None:
        """Know nothing of the blocks of caches of this shape, as `KVCache.layers` has it."""
        num_blocks, n_kv_heads, _, head_dim = shape
        self._bounds = np.zeros(
            (n_layers, n_kv_heads, num_blocks, 2 * head_dim), ml_dtypes.bfloat16
        )
        self._is_known = np.zeros((n_layers, num_blocks), bool)

    def forget(self, block_ids: np.ndarray | int) -> None:
        """Note that blocks are written."""
        self._is_known[:, block_ids] = False

    def of_layer(self, layer: int, key_cache: Any, block_ids: np.ndarray) -> np.ndarray:
        """Return a layer's bounds.

        Args:
            layer: its index.
            key_cache: of that layer.
            block_ids: (count,) distinct blocks whose bounds are wanted; all their keys are written.

        Returns:
            (n_kv_heads, num_blocks, 2 * head_dim) bfloat16, the least keys beside the greatest; of
            other blocks than those asked for they may be out of date.
        """
        missing = block_ids[~self._is_known[layer, block_ids]]
        for start in range(0, len(missing), _BLOCKS_AT_ONCE):
            some = missing[start : start + _BLOCKS_AT_ONCE]
            keys = _read_keys(key_cache, some)  # (count, n_kv_heads, block_size, head_dim)
            bounds = np.concatenate([keys.min(2), keys.max(2)], axis=-1)
            self._bounds[layer][:, some] = bounds.swapaxes(0, 1)
        self._is_known[layer, missing] = True
        return self._bounds[layer]


def _read_keys(key_cache: Any, block_ids: np.ndarray) -> np.ndarray:
    if not isinstance(key_cache, Quantized):
        return key_cache[block_ids].astype(np.float32)
    shape = (len(block_ids), *key_cache.shape[1:])
    return read_cache(Quantized(key_cache.payload[block_ids], key_cache.dtype, shape), key=True)
