"""A Llama in NumPy float64, as plain as the paper has it: the tests' ground truth."""

import numpy as np

from codellama_rt.model.config import ModelConfig
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.model.weights import LlamaWeights

_QUERY_BLOCK = 512  # bounds the scores of a long prompt to 512 rows at a time


def forward(
    weights: LlamaWeights,
    config: ModelConfig,
    token_ids,
    *,
    rows=None,
    first_position: int = 0,
    prompt_length: int = 0,
    rope: RotaryEmbedding | None = None,
) -> np.ndarray:
    """Computes logits, float64 (len(rows), vocab_size), for one sequence.

    rows: which tokens' logits, by default all. prompt_length: for dynamic rope scaling, the number
    of tokens that were computed together before one at a time followed.
    """
    token_ids = np.asarray(token_ids)
    tokens = np.arange(len(token_ids))
    positions = (first_position + tokens).astype(np.int32)
    lengths = np.maximum(prompt_length, positions + 1)
    cos, sin, index = (rope or RotaryEmbedding(config)).lookup(positions, lengths)
    turn = cos[index].astype(np.float64)[:, None], sin[index].astype(np.float64)[:, None]
    x = weights.embedding[token_ids].astype(np.float64)  # (tokens, dim)
    for i, layer in enumerate(weights.layers):
        bias = weights.biases[i] if weights.biases else {}
        asked = tokens if rows is None or layer is not weights.layers[-1] else np.asarray(rows)
        h = rms_norm(x, layer.attention_norm, config.norm_eps)
        query, key, value = (
            (linear(h, getattr(layer, name)) + bias.get(name, 0.0)).reshape(
                len(h), -1, config.head_dim
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = (rotate(t, *turn, config.rope_interleaved) for t in (query, key))
        x = x[asked] + linear(attend(query[asked], key, value, asked), layer.o_proj)
        x = x + bias.get("o_proj", 0.0)
        h = rms_norm(x, layer.mlp_norm, config.norm_eps)
        gate = linear(h, layer.gate_proj) + bias.get("gate_proj", 0.0)
        up = linear(h, layer.up_proj) + bias.get("up_proj", 0.0)
        x = x + linear(silu(gate) * up, layer.down_proj) + bias.get("down_proj", 0.0)
    return linear(rms_norm(x, weights.norm, config.norm_eps), weights.lm_head)


def linear(x, weight):
    return x @ weight.astype(np.float64).T


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def silu(x):
    return x / (1.0 + np.exp(-x))


def rotate(x, cos, sin, interleaved):
    """Turns the pairs (i, i + head_dim / 2), or (2i, 2i + 1), of x (tokens, heads, head_dim)."""
    half = x.shape[-1] // 2
    first, second = (np.s_[0::2], np.s_[1::2]) if interleaved else (np.s_[:half], np.s_[half:])
    turned = np.empty_like(x)
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def attend(query, key, value, query_tokens):
    """Causal attention of query (queries, n_heads, head_dim) over all of key and value."""
    out = np.empty(query.shape)
    group = query.shape[1] // key.shape[1]  # query heads that share a key-value head
    for head in range(query.shape[1]):
        k, v = key[:, head // group], value[:, head // group]
        for begin in range(0, len(query), _QUERY_BLOCK):
            block = np.s_[begin : begin + _QUERY_BLOCK]
            scores = query[block, head] @ k.T / np.sqrt(query.shape[-1])
            scores[query_tokens[block, None] < np.arange(len(k))] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[block, head] = weights @ v / weights.sum(axis=-1, keepdims=True)
    return out.reshape(len(query), -1)
