"""What the engine asks of a model and of its KV cache: the joints between engine and devices."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig


class KVCache(Protocol):
    """The blocks of keys and values of every layer, where the device's kernels want them.

    Attributes:
        num_blocks: blocks per layer.
        block_size: tokens per block.
        dtype: of keys and values, such as "bfloat16" or "int8".
        num_bytes: of all blocks.
        layers: a pair (key_cache, value_cache) per layer, each
            (num_blocks, n_kv_heads, block_size, head_dim); arrays, tensors or `ops.Quantized`.
        in_host_memory: whether it has `block_buffers`, as `model.kv_cache.KVCache` has it: only
            then prefixes can be kept on disk.
    """

    num_blocks: int
    block_size: int
    dtype: str
    num_bytes: int
    layers: list[tuple[Any, Any]]
    in_host_memory: bool

    def copy_blocks(self, block_pairs: np.ndarray) -> None:
        """Copy blocks source -> destination in every layer; block_pairs is (n, 2) int32."""

    def close(self) -> None:
        """Give the memory back."""


class Decoder(Protocol):
    """A model that takes steps: it holds weights and scratch memory, and no sequence's state.

    Attributes:
        config: the model's shape.
        kv_cache_type: makes the cache that `forward` takes:
            `kv_cache_type(config, num_blocks=..., block_size=..., dtype=...)`.
        applies_adapters: whether `forward` applies `Batch.adapted`.
        gives_hidden_states: whether it has `hidden_states`, as `model.llama.Llama` has it.
    """

    config: ModelConfig
    kv_cache_type: type[KVCache]
    applies_adapters: bool
    gives_hidden_states: bool

    def forward(self, batch: Batch, kv_cache: KVCache) -> np.ndarray:
        """Compute one step: write the tokens' keys and values, and return the logits asked for.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: those blocks.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
