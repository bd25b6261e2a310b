"""The attention operators, called directly."""

from __future__ import annotations

import numpy as np

from codellama_rt.ops.native import _core
from codellama_rt.ops.results import Array, empty, empty_like, shape_of


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
) -> tuple[Array, Array]:
    """Compute softmax attention of several sequences over contiguous K and V (arXiv:2307.08691).

    Args:
        query: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16.
        key: (num_keys, n_kv_heads, head_dim), any float dtype; n_kv_heads divides n_heads.
        value: like `key`.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens: where queries begin.
        cu_seqlens_k: (num_seqs + 1) int32, rising from 0 to num_keys: where keys begin.
        causal: query i of n sees keys up to length - n + i.
        scale: factor of the scores; head_dim ** -0.5 by default.
        out: (out, lse).

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
    _core.flash_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, factor, *out)
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
) -> tuple[Array, Array]:
    """Compute causal attention of one or more queries per sequence over its blocks.

    PagedAttention, arXiv:2309.06180.

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
        query, key_cache, value_cache, block_tables, seq_lens, cu_seqlens_q, factor, *out
    )
    return out


def merge_attention(
    out_a: Array,
    lse_a: Array,
    out_b: Array,
    lse_b: Array,
    *,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Merge two attentions of the same queries over disjoint keys (arXiv:2501.01005).

    Args:
        out_a: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16.
        lse_a: (num_tokens, n_heads) float32.
        out_b: like `out_a`.
        lse_b: like `lse_a`.
        out: (out, lse).

    Returns:
        (out, lse) as if all keys had been attended at once.

    Example:
        >>> x, lse = np.ones((1, 1, 2), np.float32), np.zeros((1, 1), np.float32)
        >>> merge_attention(x, lse, 3 * x, lse)[0]
        array([[[2., 2.]]], dtype=float32)
    """
    if out is None:
        out = (empty_like(out_a), empty(out_a, shape_of(out_a)[:2], np.float32))
    _core.merge_attention(out_a, lse_a, out_b, lse_b, *out)
    return out
