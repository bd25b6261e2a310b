"""The operators that apply RoPE and write the KV cache, called directly."""

from __future__ import annotations

import numpy as np  # noqa: F401 - for the examples

from codellama_rt.ops.native import _core
from codellama_rt.ops.results import Array, axis_size, empty


def apply_rotary_pos_emb(
    query: Array, key: Array, cos: Array, sin: Array, positions: Array, *, interleaved: bool = False
) -> tuple[Array, Array]:
    """Rotate queries and keys by their positions, in place: RoPE (arXiv:2104.09864).

    Args:
        query: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16; written.
        key: (num_tokens, n_kv_heads, head_dim) in query's dtype; written.
        cos: (num_positions, head_dim / 2) float32; row p belongs to position p.
        sin: like `cos`.
        positions: (num_tokens) int32.
        interleaved: elements (2i, 2i + 1) rotate together, as in Meta's and GGUF files; otherwise
            (i, i + head_dim / 2), as in Hugging Face's.

    Returns:
        (query, key), the same objects.

    Example:
        >>> q = np.array([[[1, 0]]], np.float32)
        >>> zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
        >>> apply_rotary_pos_emb(q, q.copy(), zero, one, np.zeros(1, np.int32))[0]
        array([[[0., 1.]]], dtype=float32)
    """
    _core.apply_rotary_pos_emb(query, key, cos, sin, positions, interleaved)
    return query, key


def reshape_and_cache(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Write keys and values into their slots of the paged cache, in place.

    Args:
        key: (num_tokens, n_kv_heads, head_dim) float32, float16 or bfloat16.
        value: like `key`.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32: block_id * block_size + offset; -1 skips the token.

    Example:
        >>> cache = np.zeros((1, 1, 16, 2), np.float32)
        >>> one = np.ones((1, 1, 2), np.float32)
        >>> reshape_and_cache(one, one, cache, cache.copy(), np.array([3], np.int32))
        >>> cache[0, 0, 3]
        array([1., 1.], dtype=float32)
    """
    _core.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


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
    out: Array = None,
) -> Array:
    """Apply RoPE to queries and keys and write keys and values to the cache, in one pass over qkv.

    Args:
        qkv: (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim) float32, float16 or bfloat16.
        cos: (num_positions, head_dim / 2) float32; row p belongs to position p.
        sin: like `cos`.
        positions: (num_tokens) int32.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32; -1 skips the token.
        interleaved: as in `apply_rotary_pos_emb`.
        out: (num_tokens, n_heads, head_dim) in qkv's dtype.

    Returns:
        The rotated query (num_tokens, n_heads, head_dim).

    Example:
        >>> cache = np.zeros((1, 1, 16, 2), np.float32)
        >>> qkv = np.arange(6, dtype=np.float32)[None]
        >>> zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
        >>> at = np.zeros(1, np.int32)
        >>> rope_and_cache(qkv, one, zero, at, cache, cache.copy(), at)
        array([[[0., 1.]]], dtype=float32)
    """
    if out is None:
        n_kv_heads, head_dim = axis_size(key_cache, 1), axis_size(key_cache, 3)
        n_heads = axis_size(qkv, 1) // max(head_dim, 1) - 2 * n_kv_heads
        out = empty(qkv, (axis_size(qkv, 0), max(n_heads, 0), head_dim))
    _core.rope_and_cache(
        qkv, cos, sin, positions, key_cache, value_cache, slot_mapping, interleaved, out
    )
    return out


def copy_blocks(key_cache: Array, value_cache: Array, block_pairs: Array) -> None:
    """Copy whole blocks of both caches, pair after pair, in place (copy-on-write).

    Args:
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        block_pairs: (num_pairs, 2) int32: source, destination.

    Example:
        >>> cache = np.arange(2, dtype=np.float32).repeat(32).reshape(2, 1, 16, 2)
        >>> copy_blocks(cache, cache.copy(), np.array([[1, 0]], np.int32))
        >>> cache[0, 0, 0]
        array([1., 1.], dtype=float32)
    """
    _core.copy_blocks(key_cache, value_cache, block_pairs)
