"""The NumPy oracle: every operator in float64, as plainly as its definition.

Same names, arguments and results as `codellama_rt.ops`; dtypes are left to the caller (results are
float64, in-place arguments are rounded to their own dtype). Slow on purpose: nothing is fused,
nothing is split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.quantized import Quantized
from codellama_rt.ops.reference_weights import dequantize, quantize, rounded_to_int8

__all__ = [
    "add_rms_norm", "apply_rotary_pos_emb", "attend", "copy_blocks", "decoder_layer", "dequantize",
    "embedding", "flash_attention", "gather_pages", "linear", "merge_attention", "paged_attention",
    "quantize", "reshape_and_cache", "rms_norm", "rope_and_cache", "rotate", "rounded_to_int8",
    "silu_and_mul",
]  # fmt: skip
Array = NDArray


def _f64(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


def embedding(token_ids: Array, table: Array | Quantized) -> Array:
    """Rows `token_ids` (num_tokens) of `table` (vocab_size, dim)."""
    if isinstance(table, Quantized):
        table = dequantize(table)
    return _f64(table[token_ids])


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """RMSNorm (arXiv:1910.07467) of `x` (num_tokens, dim)."""
    x = _f64(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * _f64(weight)


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """(rms_norm(s), s) of s = x + residual, rounded to x's dtype."""
    total = (_f64(x) + _f64(residual)).astype(x.dtype)
    return rms_norm(total, weight, eps), _f64(total)


def linear(
    x: Array, weight: Array | Quantized | tuple[Array, ...] | tuple[Quantized, ...]
) -> Array:
    """`x` (num_tokens, in_features) times `weight` (out_features, in_features) transposed."""
    weights = weight if isinstance(weight, (tuple, list)) else (weight,)
    if isinstance(weights[0], Quantized):
        x, weights = rounded_to_int8(x), [dequantize(w) for w in weights]
    return np.concatenate([_f64(x) @ _f64(w).T for w in weights], axis=-1)


def rotate(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool = False) -> Array:
    """RoPE (arXiv:2104.09864) of `x` (num_tokens, heads, head_dim) at `positions` (num_tokens)."""
    x, half = _f64(x), x.shape[-1] // 2
    first = (..., slice(0, None, 2)) if interleaved else (..., slice(0, half))
    second = (..., slice(1, None, 2)) if interleaved else (..., slice(half, None))
    c, s = _f64(cos)[positions][:, None, :], _f64(sin)[positions][:, None, :]
    out = np.empty_like(x)
    out[first] = x[first] * c - x[second] * s
    out[second] = x[second] * c + x[first] * s
    return out


def apply_rotary_pos_emb(
    query: Array, key: Array, cos: Array, sin: Array, positions: Array, *, interleaved: bool = False
) -> None:
    """Rotates `query` and `key` in place."""
    for x in (query, key):
        x[...] = rotate(x, cos, sin, positions, interleaved).astype(x.dtype)


def reshape_and_cache(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Writes `key` and `value` (num_tokens, n_kv_heads, head_dim) into their slots, in place."""
    block_size = key_cache.shape[2]
    for token, slot in enumerate(slot_mapping):
        if slot < 0:
            continue
        block, row = divmod(int(slot), block_size)
        key_cache[block, :, row] = key[token].astype(key_cache.dtype)
        value_cache[block, :, row] = value[token].astype(value_cache.dtype)


def rope_and_cache(
    qkv: Array, cos: Array, sin: Array, positions: Array, key_cache: Array, value_cache: Array,
    slot_mapping: Array, *, interleaved: bool = False,
) -> Array:  # fmt: skip
    """Rotates and caches the keys of `qkv`, caches its values; returns the rotated query."""
    n_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = _f64(qkv).reshape(len(qkv), -1, head_dim)
    query, key, value = np.split(heads, [-2 * n_kv_heads, -n_kv_heads], axis=1)
    key = rotate(key, cos, sin, positions, interleaved)
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
    return rotate(query, cos, sin, positions, interleaved)


def attend(
    query: Array, key: Array, value: Array, causal: bool, scale: float
) -> tuple[Array, Array]:
    """One sequence: `query` (q, n_heads, d) over `key` and `value` (k, n_kv_heads, d)."""
    num_queries, n_heads, head_dim = query.shape
    num_keys, n_kv_heads, _ = key.shape
    group = n_heads // n_kv_heads
    query = _f64(query).reshape(num_queries, n_kv_heads, group, head_dim)
    scores = np.einsum("qhgd,khd->hgqk", query, _f64(key)) * scale
    if causal:
        hidden = np.arange(num_keys) > num_keys - num_queries + np.arange(num_queries)[:, None]
        scores[..., hidden] = -np.inf
    top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = np.einsum("hgqk,khd->qhgd", weights / np.where(total > 0, total, 1), _f64(value))
    return out.reshape(num_queries, n_heads, head_dim), lse.reshape(n_heads, num_queries).T


def flash_attention(
    query: Array, key: Array, value: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, *,
    causal: bool = True, scale: float | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention of each sequence; returns (out, lse)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [
        attend(query[q0:q1], key[k0:k1], value[k0:k1], causal, scale)
        for q0, q1, k0, k1 in zip(
            cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
        )
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def gather_pages(cache: Array, block_table: Array, length: int) -> Array:
    """The first `length` rows of a sequence: (length, n_kv_heads, head_dim)."""
    block_size = cache.shape[2]
    pages = cache[block_table[: -(-length // block_size)]]
    return pages.transpose(0, 2, 1, 3).reshape(-1, cache.shape[1], cache.shape[3])[:length]


def paged_attention(
    query: Array, key_cache: Array, value_cache: Array, block_tables: Array, seq_lens: Array,
    cu_seqlens_q: Array, *, scale: float | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Causal attention over pages; over a bfloat16 cache the query is rounded to bfloat16 first."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_cache.dtype.name == "bfloat16":
        query = query.astype(key_cache.dtype)
    parts = [
        attend(
            query[q0:q1], gather_pages(key_cache, table, length),
            gather_pages(value_cache, table, length), True, scale,
        )
        for q0, q1, table, length in zip(
            cu_seqlens_q[:-1], cu_seqlens_q[1:], block_tables, seq_lens, strict=True
        )
    ]  # fmt: skip
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def merge_attention(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Joins two partial attentions by their log-sum-exps."""
    a, b = _f64(lse_a), _f64(lse_b)
    lse = np.logaddexp(a, b)
    shift = np.where(np.isfinite(lse), lse, 0)
    return (
        np.exp(a - shift)[..., None] * _f64(out_a) + np.exp(b - shift)[..., None] * _f64(out_b),
        lse,
    )


def silu_and_mul(gate_up: Array) -> Array:
    """silu(gate) * up of `gate_up` (num_tokens, 2 * hidden_dim)."""
    gate, up = np.split(_f64(gate_up), 2, axis=-1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def copy_blocks(key_cache: Array, value_cache: Array, block_pairs: Array) -> None:
    """Copies pages source -> destination, pair after pair, in place."""
    for source, destination in block_pairs:
        key_cache[destination] = key_cache[source]
        value_cache[destination] = value_cache[source]


def decoder_layer(
    x: Array, attention_norm: Array, q_proj: Array, k_proj: Array, v_proj: Array, o_proj: Array,
    mlp_norm: Array, gate_proj: Array, up_proj: Array, down_proj: Array, cos: Array, sin: Array,
    positions: Array, key_cache: Array, value_cache: Array, slot_mapping: Array,
    block_tables: Array, seq_lens: Array, cu_seqlens_q: Array, *,
    eps: float = 1e-5, interleaved: bool = False,
) -> Array:  # fmt: skip
    """A layer of Llama (arXiv:2302.13971): x + attention, then + mlp; writes the caches."""
    caches = (key_cache, value_cache)
    qkv = linear(rms_norm(x, attention_norm, eps), (q_proj, k_proj, v_proj))
    query = rope_and_cache(
        qkv, cos, sin, positions, *caches, slot_mapping, interleaved=interleaved
    )  # fmt: skip
    attended, _ = paged_attention(query, *caches, block_tables, seq_lens, cu_seqlens_q)
    x = _f64(x) + linear(attended.reshape(len(x), -1), o_proj)
    gate_up = linear(rms_norm(x, mlp_norm, eps), (gate_proj, up_proj))
    return x + linear(silu_and_mul(gate_up), down_proj)
