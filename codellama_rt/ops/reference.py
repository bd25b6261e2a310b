"""The NumPy reference: every operator in float64, written like its definition.

Same names, arguments and results as `codellama_rt.ops`; the caller chooses the dtypes (results are
float64, in-place arguments are rounded to their own dtype). Slow on purpose: nothing is fused or
split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.quantized import (
    CACHE_GROUP,
    Quantized,
    cache_row_bytes,
    read_cache,
    rotate_rows,
)
from codellama_rt.ops.reference_gguf import repack
from codellama_rt.ops.reference_sampling import sample, token_logprobs
from codellama_rt.ops.reference_weights import dequantize, quantize, rounded_to_int8

__all__ = [
    "add_rms_norm",
    "apply_rotary_pos_emb",
    "attend",
    "copy_blocks",
    "decoder_layer",
    "dequantize",
    "embedding",
    "flash_attention",
    "gather_blocks",
    "int16_query",
    "linear",
    "merge_attention",
    "paged_attention",
    "quantize",
    "repack",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
    "rotate",
    "rounded_to_int8",
    "sample",
    "silu_and_mul",
    "token_logprobs",
]
Array = NDArray


def _f64(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


def embedding(token_ids: Array, table: Array | Quantized) -> Array:
    """Return rows `token_ids` (num_tokens) of `table` (vocab_size, dim)."""
    if isinstance(table, Quantized):
        table = dequantize(table)
    return _f64(table[token_ids])


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """Return RMSNorm (arXiv:1910.07467) of `x` (num_tokens, dim)."""
    x = _f64(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * _f64(weight)


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float = 1e-5
) -> tuple[Array, Array]:
    """Return (rms_norm(s), s) for s = x + residual, rounded to x's dtype."""
    total = (_f64(x) + _f64(residual)).astype(x.dtype)
    return rms_norm(total, weight, eps), _f64(total)


def linear(
    x: Array, weight: Array | Quantized | tuple[Array, ...] | tuple[Quantized, ...]
) -> Array:
    """Return `x` (num_tokens, in_features) times the transpose of `weight` (out, in_features)."""
    weights = weight if isinstance(weight, (tuple, list)) else (weight,)
    if isinstance(weights[0], Quantized):
        x = rounded_to_int8(x, weights[0].dtype)
        weights = [dequantize(w, rotated=True) for w in weights]
    return np.concatenate([_f64(x) @ _f64(w).T for w in weights], axis=-1)


def rotate(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool = False) -> Array:
    """Return RoPE (arXiv:2104.09864) of `x` (num_tokens, heads, head_dim) at `positions`."""
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
    """Rotate `query` and `key` in place."""
    for x in (query, key):
        x[...] = rotate(x, cos, sin, positions, interleaved).astype(x.dtype)


def quantize_int8_rows(x: Array) -> tuple[Array, Array]:
    """Quantise rows (..., head_dim) of an int8 cache: values int8, scales (...) float32."""
    x = np.asarray(x, np.float32)
    greatest = np.abs(x).max(axis=-1)
    finite = np.isfinite(greatest)
    usable = finite & (greatest > 1e-30)
    inverse = np.float32(127) / np.where(usable, greatest, np.float32(1)) * usable
    values = np.rint(np.where(finite[..., None], x, 0) * inverse[..., None])
    scales = np.where(finite, greatest, np.nan).astype(np.float32) / np.float32(127)
    return values.astype(np.int8), scales


def quantize_int4_rows(x: Array, *, key: bool) -> tuple[Array, Array, Array]:
    """Quantise rows (..., head_dim) of an int4 cache.

    Returns values uint8, scales and minimums (...) float16. Keys are rotated and have 5 bits.
    """
    x = np.asarray(x, np.float32)
    most = np.float32(31 if key else 15)
    with np.errstate(over="ignore", invalid="ignore"):
        if key:
            x = rotate_rows(x, for_query=False)
        low, high = x.min(axis=-1) + np.float32(0), x.max(axis=-1)
        scales, minimums = ((high - low) / most).astype(np.float16), low.astype(np.float16)
    finite = np.isfinite(x).all(axis=-1) & np.isfinite(scales) & np.isfinite(minimums)
    step = np.where(finite, scales, 0).astype(np.float32)
    inverse = (step > 0) / np.where(step > 0, step, np.float32(1))
    start = np.where(finite, minimums, 0).astype(np.float32)
    scaled = (np.where(finite[..., None], x, 0) - start[..., None]) * inverse[..., None]
    values = np.clip(np.rint(scaled), 0, most).astype(np.uint8)
    nan = np.float16(np.nan)
    return values, np.where(finite, scales, nan), np.where(finite, minimums, nan)


def write_row(cache: Quantized, rows: Array, slot: int, *, key: bool) -> None:
    """Write one token's `rows` (n_kv_heads, head_dim) into a slot of a quantised cache."""
    num_blocks, n_kv_heads, block_size, head_dim = cache.shape
    row_bytes = cache_row_bytes(cache.dtype, head_dim)[0 if key else 1]
    block, row = divmod(int(slot), block_size)
    group, row = divmod(row, CACHE_GROUP)
    blocks = cache.payload.reshape(num_blocks, n_kv_heads, -1, CACHE_GROUP * row_bytes)
    if cache.dtype == "int8":
        values, scales = quantize_int8_rows(rows)
        parts = [values.view(np.uint8), scales[:, None].view(np.uint8)]
    else:
        values, scales, minimums = quantize_int4_rows(rows, key=key)
        even, odd = values[:, ::2], values[:, 1::2]
        parts = [(even & 15) | (odd & 15) << 4]
        if key:
            bits = np.concatenate([even >> 4, odd >> 4], axis=1)
            parts.append(np.packbits(bits, axis=1, bitorder="little"))
        parts += [scales[:, None].view(np.uint8), minimums[:, None].view(np.uint8)]
    begin = 0
    for part in parts:  # the rows of a group are contiguous per kind
        width = part.shape[1]
        blocks[block, :, group, begin + row * width : begin + (row + 1) * width] = part
        begin += CACHE_GROUP * width


def reshape_and_cache(
    key: Array,
    value: Array,
    key_cache: Array | Quantized,
    value_cache: Array | Quantized,
    slot_mapping: Array,
) -> None:
    """Write `key` and `value` (num_tokens, n_kv_heads, head_dim) into their slots, in place."""
    block_size = key_cache.shape[2]
    for token, slot in enumerate(slot_mapping):
        if slot < 0:
            continue
        if isinstance(key_cache, Quantized):
            write_row(key_cache, key[token], slot, key=True)
            write_row(value_cache, value[token], slot, key=False)
            continue
        block, row = divmod(int(slot), block_size)
        key_cache[block, :, row] = key[token].astype(key_cache.dtype)
        value_cache[block, :, row] = value[token].astype(value_cache.dtype)


def rope_and_cache(
    qkv: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    *,
    interleaved: bool = False,
) -> Array:
    """Rotate and cache the keys of `qkv`, cache its values and return the rotated query."""
    n_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = _f64(qkv).reshape(len(qkv), -1, head_dim)
    query, key, value = np.split(heads, [-2 * n_kv_heads, -n_kv_heads], axis=1)
    key = rotate(key, cos, sin, positions, interleaved)
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
    return rotate(query, cos, sin, positions, interleaved)


def attend(
    query: Array, key: Array, value: Array, causal: bool, scale: float
) -> tuple[Array, Array]:
    """Attend in one sequence: `query` (q, n_heads, d) over `key`, `value` (k, n_kv_heads, d)."""
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
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Compute softmax attention of each sequence; returns (out, lse)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [
        attend(query[q0:q1], key[k0:k1], value[k0:k1], causal, scale)
        for q0, q1, k0, k1 in zip(
            cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
        )
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def gather_blocks(cache: Array, block_table: Array, length: int) -> Array:
    """Return the first `length` rows of a sequence: (length, n_kv_heads, head_dim)."""
    block_size = cache.shape[2]
    blocks = cache[block_table[: -(-length // block_size)]]
    return blocks.transpose(0, 2, 1, 3).reshape(-1, cache.shape[1], cache.shape[3])[:length]


def int16_query(query: Array, *, rotated: bool) -> Array:
    """Return `query` (..., head_dim) as multiplied with quantised keys: int16 with one scale."""
    query = np.asarray(query, np.float32)
    limit = np.float32(min(127 * 256, 2**24 // query.shape[-1]))
    if rotated:
        query = rotate_rows(query, for_query=True)
    greatest = np.abs(query).max(axis=-1, keepdims=True)
    inverse = np.where(greatest > 1e-30, limit / np.maximum(greatest, 1e-30), 0).astype(np.float32)
    values = np.rint(query * inverse) * (greatest / limit).astype(np.float64)
    return rotate_rows(values, for_query=False) if rotated else values


def paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    *,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Attend causally over blocks, with the query rounded as the kernels round it."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(key_cache, Quantized):
        query = int16_query(query, rotated=key_cache.dtype == "int4")
        key_cache, value_cache = read_cache(key_cache, key=True), read_cache(value_cache, key=False)
    elif key_cache.dtype.name == "bfloat16":
        query = query.astype(key_cache.dtype)
    parts = [
        attend(
            query[q0:q1],
            gather_blocks(key_cache, table, length),
            gather_blocks(value_cache, table, length),
            True,
            scale,
        )
        for q0, q1, table, length in zip(
            cu_seqlens_q[:-1], cu_seqlens_q[1:], block_tables, seq_lens, strict=True
        )
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def merge_attention(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Merge two partial attentions by their log-sum-exps."""
    a, b = _f64(lse_a), _f64(lse_b)
    lse = np.logaddexp(a, b)
    shift = np.where(np.isfinite(lse), lse, 0)
    return (
        np.exp(a - shift)[..., None] * _f64(out_a) + np.exp(b - shift)[..., None] * _f64(out_b),
        lse,
    )


def silu_and_mul(gate_up: Array) -> Array:
    """Return silu(gate) * up of `gate_up` (num_tokens, 2 * hidden_dim)."""
    gate, up = np.split(_f64(gate_up), 2, axis=-1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def copy_blocks(key_cache: Array, value_cache: Array, block_pairs: Array) -> None:
    """Copy blocks source -> destination, pair after pair, in place."""
    if isinstance(key_cache, Quantized):
        key_cache, value_cache = key_cache.payload, value_cache.payload
    for source, destination in block_pairs:
        key_cache[destination] = key_cache[source]
        value_cache[destination] = value_cache[source]


def decoder_layer(
    x: Array,
    attention_norm: Array,
    q_proj: Array,
    k_proj: Array,
    v_proj: Array,
    o_proj: Array,
    mlp_norm: Array,
    gate_proj: Array,
    up_proj: Array,
    down_proj: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    *,
    eps: float = 1e-5,
    interleaved: bool = False,
) -> Array:
    """Run a layer of Llama (arXiv:2302.13971): x + attention, then + mlp; writes the caches."""
    caches = (key_cache, value_cache)
    qkv = linear(rms_norm(x, attention_norm, eps), (q_proj, k_proj, v_proj))
    query = rope_and_cache(qkv, cos, sin, positions, *caches, slot_mapping, interleaved=interleaved)
    attended, _ = paged_attention(query, *caches, block_tables, seq_lens, cu_seqlens_q)
    x = _f64(x) + linear(attended.reshape(len(x), -1), o_proj)
    gate_up = linear(rms_norm(x, mlp_norm, eps), (gate_proj, up_proj))
    return x + linear(silu_and_mul(gate_up), down_proj)
