"""The KV cache in device memory."""

from __future__ import annotations

import numpy as np

from codellama_rt.model.config import ModelConfig
from codellama_rt.model.cuda import ops, tensor
from codellama_rt.model.kv_cache import check_blocks
from codellama_rt.ops import native
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import Quantized

QUANTIZED_DTYPES = ("int8", "fp8")
_SCALE_BYTES = 4


class DeviceKVCache:
    """Blocks of keys and values as in `KVCache`, on the device.

    Attributes:
        num_blocks: blocks per layer.
        block_size: tokens per block, a multiple of 16.
        layers: n_layers pairs (key_cache, value_cache): DeviceTensors, or Quantized for int8, fp8.
    """

    in_host_memory = False

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int = 64, dtype: str = "bfloat16"
    ) -> None:
        """Allocate memory for `num_blocks` blocks.

        Raises:
            ValueError: a size that is not positive, or block_size not a multiple of 16.
            RuntimeError: the device does not have the memory.
        """
        check_blocks(num_blocks, block_size)
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (num_blocks, config.n_kv_heads, block_size, config.head_dim)
        bytes_each = num_blocks * config.n_kv_heads * block_size * row_bytes(config, dtype)
        self.num_bytes = 2 * config.n_layers * bytes_each
        self._memory = tensor.Memory(self.num_bytes)
        self.layers = []
        for layer in range(config.n_layers):
            begin = self._memory.pointer + 2 * layer * bytes_each
            self.layers.append(
                tuple(self._blocks(begin + i * bytes_each, shape, bytes_each) for i in range(2))
            )

    def _blocks(
        self, pointer: int, shape: tuple[int, ...], num_bytes: int
    ) -> tensor.DeviceTensor | Quantized:
        if self.dtype not in QUANTIZED_DTYPES:
            return tensor.DeviceTensor(pointer, shape, self.dtype, self._memory)
        payload = tensor.DeviceTensor(pointer, (num_bytes,), "uint8", self._memory)
        return Quantized(payload, self.dtype, shape)

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy blocks source -> destination in every layer; block_pairs is (n, 2) int32."""
        pairs = tensor.to_device(block_pairs)
        for key_cache, value_cache in self.layers:
            ops.copy_blocks(key_cache, value_cache, pairs)
        native.cuda().synchronize()  # the pairs' memory is freed on return

    def close(self) -> None:
        """Forget the blocks; the memory is freed with the last tensor that views it."""
        self.layers, self._memory = [], None


def row_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of one token's keys (or values) per head and layer, scales included."""
    if dtype in QUANTIZED_DTYPES:
        return config.head_dim + _SCALE_BYTES
    return config.head_dim * numpy_dtype(dtype).itemsize


def require_kv_dtype(dtype: str) -> None:
    """Reject dtypes that a cache on the device does not support."""
    if dtype not in (*FLOAT_DTYPES, *QUANTIZED_DTYPES):
        allowed = ", ".join((*FLOAT_DTYPES, *QUANTIZED_DTYPES))
        raise ValueError(f"kv_dtype must be one of auto, {allowed} on cuda, got {dtype!r}")
