"""The attention operators, and those that rotate queries and keys and write the cache."""

from __future__ import annotations

import numpy as np

from codellama_rt.ops.native import _core
from codellama_rt.ops.results import Array, axis_size, empty, empty_like, shape_of


def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    out: tuple[Array, Array] | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Compute softmax attention of several sequences over contiguous K and V (arXiv:2307.08691).

    Over bfloat16 K and V the query, and on CPUs with bfloat16 dot products the softmax's weights,
    are rounded to bfloat16.

    Args:
        query: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16.
        key: (num_keys, n_kv_heads, head_dim), any float dtype; n_kv_heads divides n_heads.
        value: like `key`.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens: where queries begin.
        cu_seqlens_k: (num_seqs + 1) int32, rising from 0 to num_keys: where keys begin.
        causal: query i of n sees keys up to length - n + i.
        scale: factor of the scores; head_dim ** -0.5 by default.
        out: (out, lse).
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        out (num_tokens, n_heads, head_dim) in query's dtype; lse (num_tokens, n_heads) float32, the
        natural log-sum-exp of the scores. A query that sees no key gives 0 and -inf.

    Example:
        >>> one, ends = np.ones((1, 1, 2), np.float32), np.array([0, 1], np.int32)
        >>> flash_attention(one, one, one, ends, ends)[0]
        array([[[1., 1.]]], dtype=float32)
    """
    if out is None:
        out = (empty_like(query), empty(query, shape_of(query)[:2], np.float32))
    factor = 0.0 if scale is None else scale
    _core.flash_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        factor,
        *out,
        num_threads,
    )
    return out


def paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    *,
    scale: float | None = None,
    out: tuple[Array, Array] | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Compute causal attention of one or more queries per sequence over its blocks.

    PagedAttention, arXiv:2309.06180. On the CPU, sequences whose tables begin with the same blocks
    are attended together over whole splits of 1024 keys of these, which are then read once. The
    softmax's weights are float32; over a bfloat16 cache they are rounded to bfloat16 on CPUs with
    bfloat16 dot products, over a quantised one to 16 bits on CPUs with AVX512-VNNI.

    Args:
        query: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16. Over a bfloat16 cache
            it is rounded to bfloat16, over a quantised one to int16 with one scale per head.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4; block_size is a multiple of 16, n_kv_heads divides n_heads.
        value_cache: like `key_cache`.
        block_tables: (num_seqs, max_blocks) int32; entries past a sequence's blocks are not read.
        seq_lens: (num_seqs) int32: keys of each sequence, including those of the queries.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens. One query per sequence is
            decoding, k + 1 are speculation, more are a chunk of a prompt.
        scale: factor of the scores; head_dim ** -0.5 by default.
        out: (out, lse).
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        out (num_tokens, n_heads, head_dim) in query's dtype; lse (num_tokens, n_heads) float32.
        A row's bits depend only on its own sequence: not on the batch, the chunk, the placement of
        blocks, block_size or the number of threads.

    Example:
        >>> cache = np.ones((1, 1, 16, 2), np.float32)
        >>> query, ends = np.ones((1, 1, 2), np.float32), np.array([0, 1], np.int32)
        >>> table, lens = np.zeros((1, 1), np.int32), np.array([5], np.int32)
        >>> paged_attention(query, cache, cache, table, lens, ends)[0]
        array([[[1., 1.]]], dtype=float32)
    """
    if out is None:
        out = (empty_like(query), empty(query, shape_of(query)[:2], np.float32))
    factor = 0.0 if scale is None else scale
    _core.paged_attention(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        cu_seqlens_q,
        factor,
        *out,
        num_threads,
    )
    return out


def merge_attention(
    out_a: Array,
    lse_a: Array,
    out_b: Array,
    lse_b: Array,
    *,
    out: tuple[Array, Array] | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Merge two attentions of the same queries over disjoint keys (arXiv:2501.01005).

    Args:
        out_a: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16.
        lse_a: (num_tokens, n_heads) float32.
        out_b: like `out_a`.
        lse_b: like `lse_a`.
        out: (out, lse).
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (out, lse) as if all keys had been attended at once.

    Example:
        >>> x, lse = np.ones((1, 1, 2), np.float32), np.zeros((1, 1), np.float32)
        >>> merge_attention(x, lse, 3 * x, lse)[0]
        array([[[2., 2.]]], dtype=float32)
    """
    if out is None:
        out = (empty_like(out_a), empty(out_a, shape_of(out_a)[:2], np.float32))
    _core.merge_attention(out_a, lse_a, out_b, lse_b, *out, num_threads)
    return out


def apply_rotary_pos_emb(
    query: Array,
    key: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    *,
    interleaved: bool = False,
    num_threads: int | None = None,
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
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (query, key), the same objects.

    Example:
        >>> q = np.array([[[1, 0]]], np.float32)
        >>> zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
        >>> apply_rotary_pos_emb(q, q.copy(), zero, one, np.zeros(1, np.int32))[0]
        array([[[0., 1.]]], dtype=float32)
    """
    _core.apply_rotary_pos_emb(query, key, cos, sin, positions, interleaved, num_threads)
    return query, key


def reshape_and_cache(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slot_mapping: Array,
    *,
    num_threads: int | None = None,
) -> None:
    """Write keys and values into their slots of the paged cache, in place.

    Args:
        key: (num_tokens, n_kv_heads, head_dim) float32, float16 or bfloat16.
        value: like `key`.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32: block_id * block_size + offset; -1 skips the token.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Example:
        >>> cache = np.zeros((1, 1, 16, 2), np.float32)
        >>> one = np.ones((1, 1, 2), np.float32)
        >>> reshape_and_cache(one, one, cache, cache.copy(), np.array([3], np.int32))
        >>> cache[0, 0, 3]
        array([1., 1.], dtype=float32)
    """
    _core.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, num_threads)


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
    num_threads: int | None = None,
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
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

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
        qkv,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        interleaved,
        out,
        num_threads,
    )
    return out


def copy_blocks(
    key_cache: Array, value_cache: Array, block_pairs: Array, *, num_threads: int | None = None
) -> None:
    """Copy whole blocks of both caches, pair after pair, in place (copy-on-write).

    Args:
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        block_pairs: (num_pairs, 2) int32: source, destination.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Example:
        >>> cache = np.arange(2, dtype=np.float32).repeat(32).reshape(2, 1, 16, 2)
        >>> copy_blocks(cache, cache.copy(), np.array([[1, 0]], np.int32))
        >>> cache[0, 0, 0]
        array([1., 1.], dtype=float32)
    """
    _core.copy_blocks(key_cache, value_cache, block_pairs, num_threads)
