"""The operators on DeviceTensors, with the names, arguments and results of `codellama_rt.ops`.

Calls are asynchronous on the module's current stream. Shapes and dtypes are checked; indices in
device memory are not: token ids, positions, slots, tables and lengths must be valid. Weights are
`ops.Quantized` in "int8_mma" or "int4_mma", caches in "int8" or "fp8".
"""

from __future__ import annotations

from typing import Any

from codellama_rt.model.cuda.tensor import DeviceTensor, empty
from codellama_rt.ops.native import cuda
from codellama_rt.ops.quantized import Quantized

Tensor = DeviceTensor
Weight = DeviceTensor | Quantized


def embedding(token_ids: Tensor, table: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return rows `token_ids` (num_tokens) of `table` (vocab_size, dim); default: float32."""
    if out is None:
        out = empty((token_ids.shape[0], table.shape[1]), "float32")
    cuda().embedding(token_ids, table, out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None) -> Tensor:
    """Return RMSNorm of `x` (num_tokens, dim)."""
    if out is None:
        out = empty(x.shape, x.dtype)
    cuda().rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    if out is None:
        out = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    cuda().add_rms_norm(x, residual, weight, eps, *out)
    return out


def linear(x: Tensor, weight: Weight | tuple[Weight, ...], *, out: Tensor | None = None) -> Tensor:
    """Return `x` (num_tokens, in_features) times weight transposed; up to three weights as one."""
    if out is None:
        weights = weight if isinstance(weight, (tuple, list)) else (weight,)
        out = empty((x.shape[0], sum(w.shape[0] for w in weights)), x.dtype)
    cuda().linear(x, weight, out)
    return out


def apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply RoPE to `query` and `key` (num_tokens, heads, head_dim), in place."""
    cuda().apply_rotary_pos_emb(query, key, cos, sin, positions, interleaved)
    return query, key


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Any, value_cache: Any, slot_mapping: Tensor
) -> None:
    """Write keys and values into their slots; -1 skips a token."""
    cuda().reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate query and key, cache key and value and return the rotated query."""
    if out is None:
        n_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
        out = empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * n_kv_heads, head_dim), qkv.dtype)
    cuda().rope_and_cache(
        qkv, cos, sin, positions, key_cache, value_cache, slot_mapping, interleaved, out
    )
    return out


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over contiguous keys and values of several sequences; returns (out, lse)."""
    if out is None:
        out = empty(query.shape, query.dtype), empty(query.shape[:2], "float32")
    cuda().flash_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale or 0.0, *out
    )
    return out


def paged_attention(
    query: Tensor,
    key_cache: Any,
    value_cache: Any,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally over blocks, one or more queries per sequence; returns (out, lse)."""
    if out is None:
        out = empty(query.shape, query.dtype), empty(query.shape[:2], "float32")
    cuda().paged_attention(
        query, key_cache, value_cache, block_tables, seq_lens, cu_seqlens_q, scale or 0.0, *out
    )
    return out


def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge two attentions of the same queries over disjoint keys."""
    if out is None:
        out = empty(out_a.shape, out_a.dtype), empty(lse_a.shape, "float32")
    cuda().merge_attention(out_a, lse_a, out_b, lse_b, *out)
    return out


def silu_and_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up of `gate_up` (num_tokens, 2 * hidden_dim)."""
    if out is None:
        out = empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    cuda().silu_and_mul(gate_up, out)
    return out


def copy_blocks(key_cache: Any, value_cache: Any, block_pairs: Tensor) -> None:
    """Copy blocks source -> destination, pair after pair."""
    cuda().copy_blocks(key_cache, value_cache, block_pairs)
