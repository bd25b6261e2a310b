"""Code Llama's shapes, and the matrices of one of their layers."""

from __future__ import annotations

from codellama_rt.model.config import ModelConfig

MAX_POSITIONS = 131072  # Meta's files say 16,384; long contexts are measured as well


def _config(n_layers: int, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int,
            vocab_size: int) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=dim // n_heads, dim=dim,
        hidden_dim=hidden_dim, vocab_size=vocab_size, rope_theta=1e6,
        max_position_embeddings=MAX_POSITIONS, dtype="bfloat16",
    )  # fmt: skip


SHAPES = {
    "7b": _config(32, 4096, 32, 32, 11008, 32016),
    "13b": _config(40, 5120, 40, 40, 13824, 32016),
    "34b": _config(48, 8192, 64, 8, 22016, 32000),
    "70b": _config(80, 8192, 64, 8, 28672, 32016),
    "tiny": _config(2, 256, 8, 2, 688, 512),
}


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each matrix product of a step, as the model calls them."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "qkv": (q_dim + 2 * kv_dim, config.dim),
        "o": (config.dim, q_dim),
        "gate_up": (2 * config.hidden_dim, config.dim),
        "down": (config.dim, config.hidden_dim),
        "lm_head": (config.vocab_size, config.dim),
    }
