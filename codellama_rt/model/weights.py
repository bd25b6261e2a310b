"""The weights a model computes with: arrays, or quantized payloads, as they lie in the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.quantized import Quantized

Weight = np.ndarray | Quantized


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one decoder layer; projections are (out, in), as in the file.

    Each is an array, or a `Quantized` in a dtype of its own.
    """

    attention_norm: np.ndarray  # (dim)
    q_proj: Weight  # (n_heads * head_dim, dim)
    k_proj: Weight  # (n_kv_heads * head_dim, dim)
    v_proj: Weight  # (n_kv_heads * head_dim, dim)
    o_proj: Weight  # (dim, n_heads * head_dim)
    mlp_norm: np.ndarray  # (dim)
    gate_proj: Weight  # (hidden_dim, dim)
    up_proj: Weight  # (hidden_dim, dim)
    down_proj: Weight  # (dim, hidden_dim)


@dataclass(frozen=True)
class LlamaWeights:
    """All weights of a model; bfloat16 is `ml_dtypes.bfloat16`."""

    embedding: Weight  # (vocab_size, dim); quantised only as a GGUF file has it
    layers: list[LayerWeights]
    norm: np.ndarray  # (dim)
    lm_head: Weight  # (vocab_size, dim); the same object as embedding when tied and not quantised
    biases: tuple[Mapping[str, np.ndarray], ...] = ()  # per layer the projections' (out), by field


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's weights by their fields in `LayerWeights`."""
    dim, hidden_dim = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attention_norm": (dim,),
        "q_proj": (q_dim, dim),
        "k_proj": (kv_dim, dim),
        "v_proj": (kv_dim, dim),
        "o_proj": (dim, q_dim),
        "mlp_norm": (dim,),
        "gate_proj": (hidden_dim, dim),
        "up_proj": (hidden_dim, dim),
        "down_proj": (dim, hidden_dim),
    }
