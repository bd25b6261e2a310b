"""The KV cache in device memory."""

from __future__ import annotations

import numpy as np

from codellama_rt.llm.memory import parse_bytes
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.cuda import ops, tensor
from codellama_rt.ops import cuda_device as device
from codellama_rt.ops.dtypes import FLOAT_DTYPES, numpy_dtype
from codellama_rt.ops.quantized import Quantized

QUANTIZED_DTYPES = ("int8", "fp8")
MEMORY_SHARE = 0.9  # of what the weights leave free; the rest is for activations and graphs
_SCALE_BYTES = 4


class DeviceKVCache:
    """Blocks of keys and values as in `KVCache`, on the device.

    Attributes:
        num_blocks: blocks per layer.
        block_size: tokens per block, a multiple of 16.
        layers: n_layers pairs (key_cache, value_cache): DeviceTensors, or Quantized for int8, fp8.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int = 64, dtype: str = "bfloat16"
    ) -> None:
        """Allocate memory for `num_blocks` blocks.

        Raises:
            ValueError: a size that is not positive, or block_size not a multiple of 16.
            RuntimeError: the device does not have the memory.
        """
        if num_blocks < 1 or block_size < 16 or block_size % 16:
            raise ValueError(
                "the KV cache needs num_blocks >= 1 and block_size a positive multiple of 16, "
                f"got {num_blocks} and {block_size}"
            )
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

    def _blocks(self, pointer: int, shape: tuple[int, ...], num_bytes: int) -> object:
        if self.dtype not in QUANTIZED_DTYPES:
            return tensor.DeviceTensor(pointer, shape, self.dtype, self._memory)
        payload = tensor.DeviceTensor(pointer, (num_bytes,), "uint8", self._memory)
        return Quantized(payload, self.dtype, shape)

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy blocks source -> destination in every layer; block_pairs is (n, 2) int32."""
        pairs = tensor.to_device(block_pairs)
        for key_cache, value_cache in self.layers:
            ops.copy_blocks(key_cache, value_cache, pairs)
        device.module().synchronize()  # the pairs' memory is freed on return

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


def plan_num_blocks(
    config: ModelConfig,
    dtype: str,
    block_size: int,
    *,
    longest: int | None,
    max_num_seqs: int,
    kv_memory: int | str | None,
) -> int:
    """Return the number of blocks to allocate, once the weights are on the device.

    Args:
        config: of the model.
        dtype: of the cache.
        block_size: tokens per block.
        longest: tokens of one sequence that must fit; None: no minimum.
        max_num_seqs: sequences at a time.
        kv_memory: bytes or a str like "8GB"; None: most of the free memory.

    Raises:
        RuntimeError: `longest` tokens do not fit.
    """
    block_bytes = 2 * config.n_layers * config.n_kv_heads * row_bytes(config, dtype) * block_size
    free = device.module().memory_info()[0]
    budget = int(MEMORY_SHARE * free) if kv_memory is None else parse_bytes(kv_memory)
    required = -(-(longest or 1) // block_size)
    if budget // block_bytes < required:
        raise RuntimeError(
            f"the KV cache of {longest or block_size} tokens takes "
            f"{required * block_bytes / 1e9:.2f} GB in {dtype}, and the device has "
            f"{budget / 1e9:.2f} GB for it; lower max_model_len, or ask for kv_dtype='fp8'"
        )
    if kv_memory is not None:
        return budget // block_bytes
    usual = -(-(longest or config.max_position_embeddings) // block_size)
    return min(budget // block_bytes, usual * max_num_seqs)
