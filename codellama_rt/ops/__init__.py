"""The operators, called directly: NumPy arrays or MindSpore Tensors in, the same kind out.

Shapes, dtypes and costs of each op: `ops.schema`; its definition in NumPy: `ops.reference`; the
MindSpore primitives of the same kernels: `ops.graph`. Every op checks its arguments before it
writes anything: ValueError for shapes and values, TypeError for dtypes. `out=` takes preallocated
results. Calls run synchronously in the caller's thread and release the GIL.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from codellama_rt import _core
from codellama_rt.ops.control import (
    available,
    available_isas,
    isa,
    num_threads,
    set_isa,
    set_num_threads,
)
from codellama_rt.ops.quantized import OWN_WEIGHT_DTYPES, Quantized, weight_num_bytes

__all__ = [
    "Quantized", "add_rms_norm", "apply_rotary_pos_emb", "available", "available_isas",
    "copy_blocks", "decoder_layer", "embedding", "flash_attention", "isa", "linear",
    "merge_attention", "num_threads", "paged_attention", "quantize", "reshape_and_cache",
    "rms_norm", "rope_and_cache", "set_isa", "set_num_threads", "silu_and_mul",
]  # fmt: skip

Array = Any  # numpy.ndarray or mindspore.Tensor, contiguous


def __getattr__(name: str) -> Any:
    """`ops.graph`, on first use: it imports MindSpore."""
    if name != "graph":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("codellama_rt.ops.graph")


# Results are made before the arguments are checked: what is no tensor, or lacks an axis, gives some
# result here, and the op itself then says what is wrong with it.


def _shape(argument: Array) -> tuple[int, ...]:
    return getattr(argument, "shape", ())


def _size(argument: Array, axis: int) -> int:
    shape = _shape(argument)
    return shape[axis] if axis < len(shape) else 0


def _empty_like(argument: Array) -> Array:
    return _empty(argument, _shape(argument))


def _empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised result of the same kind as `like`, and of its dtype unless one is given."""
    if not hasattr(like, "data_ptr"):
        return np.empty(shape, getattr(like, "dtype", None) if dtype is None else dtype)
    import mindspore
    import ml_dtypes

    name = str(like.dtype).lower() if dtype is None else np.dtype(dtype).name
    array = np.empty(shape, ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return mindspore.Tensor.from_numpy(array)


def embedding(token_ids: Array, table: Array, *, out: Array = None) -> Array:
    """Rows `token_ids` of a table.

    Args:
        token_ids: (num_tokens) int32, each in [0, vocab_size).
        table: (vocab_size, dim) float32, float16 or bfloat16, or a `Quantized` weight.
        out: (num_tokens, dim), any float dtype; float32 by default.

    Returns:
        (num_tokens, dim).

    Example:
        >>> embedding(np.array([1], np.int32), np.eye(2, dtype=np.float32))
        array([[0., 1.]], dtype=float32)
    """
    if out is None:
        out = _empty(token_ids, (_size(token_ids, 0), _size(table, 1)), np.float32)
    _core.embedding(token_ids, table, out)
    return out


def rms_norm(x: Array, weight: Array, eps: float = 1e-5, *, out: Array = None) -> Array:
    """RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight, statistics in float32.

    Args:
        x: (num_tokens, dim) float32, float16 or bfloat16.
        weight: (dim), any float dtype.
        eps: added to the mean square.
        out: (num_tokens, dim) in x's dtype; may be `x`.

    Returns:
        (num_tokens, dim) in x's dtype.

    Example:
        >>> rms_norm(np.full((1, 2), 3, np.float32), np.ones(2, np.float32), 0.0)
        array([[1., 1.]], dtype=float32)
    """
    if out is None:
        out = _empty_like(x)
    _core.rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float = 1e-5, *,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """rms_norm of x + residual, and that sum: the residual stream's step between two sublayers.

    Args:
        x: (num_tokens, dim) float32, float16 or bfloat16.
        residual: like `x`.
        weight: (dim), any float dtype.
        eps: added to the mean square.
        out: (normalized, sum), each like `x`; `(x, residual)` works in place.

    Returns:
        (rms_norm(x + residual), x + residual).

    Example:
        >>> one = np.ones((1, 2), np.float32)
        >>> add_rms_norm(one, one, np.ones(2, np.float32), 0.0)[1]
        array([[2., 2.]], dtype=float32)
    """
    if out is None:
        out = (_empty_like(x), _empty_like(x))
    _core.add_rms_norm(x, residual, weight, eps, out[0], out[1])
    return out


def linear(x: Array, weight: Array | tuple[Array, ...], *, out: Array = None) -> Array:
    """x times weight transposed, accumulated in float32; a row's bits do not depend on num_tokens.

    Args:
        x: (num_tokens, in_features) float32, float16 or bfloat16; rows may lie apart. Over bfloat16
            weights it is rounded to bfloat16 where the CPU has such dot products.
        weight: (out_features, in_features) as it lies in a checkpoint, any float dtype, or a
            `Quantized` one, over which x is rounded to int8 in groups of 32; or a tuple of up to
            three of one dtype that are multiplied in one pass as if they were one of all their
            rows.
        out: (num_tokens, out_features), any float dtype; x's by default; rows may lie apart.

    Returns:
        (num_tokens, out_features).

    Example:
        >>> linear(np.ones((1, 3), np.float32), np.ones((2, 3), np.float32))
        array([[3., 3.]], dtype=float32)
    """
    if out is None:
        weights = weight if isinstance(weight, (tuple, list)) else (weight,)
        out = _empty(x, (_size(x, 0), sum(_size(w, 0) for w in weights)))
    _core.linear(x, weight, out)
    return out


def quantize(weight: Array, dtype: str) -> Quantized:
    """A weight in int8 or int4, with a scale (int4: and a minimum) for every 32 elements of a row.

    A row that holds a NaN or an infinity gives NaN. The bytes are the same on every
    instruction set.

    Args:
        weight: (out_features, in_features) float32, float16 or bfloat16.
        dtype: "int8" (8.5 bits an element) or "int4" (4.5 bits).

    Returns:
        What `linear` and `embedding` take; its payload is of the same kind as `weight`.

    Raises:
        ValueError: another dtype, or a weight that is not a matrix.
        TypeError: a weight of another dtype.

    Example:
        >>> quantized = quantize(np.eye(2, dtype=np.float32), "int8")
        >>> quantized.shape, quantized.nbytes
        ((2, 2), 544)
    """
    if dtype not in OWN_WEIGHT_DTYPES:
        names = " or ".join(OWN_WEIGHT_DTYPES)
        raise ValueError(f"quantize: dtype must be {names}, got {dtype!r}")
    shape = (_size(weight, 0), _size(weight, 1))
    payload = _empty(weight, (weight_num_bytes(dtype, shape),), np.uint8)
    quantized = Quantized(payload, dtype, shape)
    _core.quantize(weight, quantized)
    return quantized


def apply_rotary_pos_emb(
    query: Array, key: Array, cos: Array, sin: Array, positions: Array, *, interleaved: bool = False
) -> tuple[Array, Array]:
    """RoPE (arXiv:2104.09864): rotates queries and keys by their positions, in place.

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
    """Writes keys and values into their slots of the paged cache, in place.

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
    qkv: Array, cos: Array, sin: Array, positions: Array, key_cache: Array, value_cache: Array,
    slot_mapping: Array, *, interleaved: bool = False, out: Array = None,
) -> Array:  # fmt: skip
    """Rotates query and key and writes key and value into the paged cache: one pass over qkv.

    Args:
        qkv: (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim) float32, float16 or bfloat16.
        cos: (num_positions, head_dim / 2) float32; row p belongs to position p.
        sin: like `cos`.
        positions: (num_tokens) int32.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32; -1 writes nothing of that token.
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
        n_kv_heads, head_dim = _size(key_cache, 1), _size(key_cache, 3)
        n_heads = _size(qkv, 1) // max(head_dim, 1) - 2 * n_kv_heads
        out = _empty(qkv, (_size(qkv, 0), max(n_heads, 0), head_dim))
    _core.rope_and_cache(
        qkv, cos, sin, positions, key_cache, value_cache, slot_mapping, interleaved, out
    )
    return out


def flash_attention(
    query: Array, key: Array, value: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, *,
    causal: bool = True, scale: float | None = None, out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention of several sequences over contiguous keys and values (arXiv:2307.08691).

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
        out = (_empty_like(query), _empty(query, _shape(query)[:2], np.float32))
    factor = 0.0 if scale is None else scale
    _core.flash_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, factor, *out)
    return out


def paged_attention(
    query: Array, key_cache: Array, value_cache: Array, block_tables: Array, seq_lens: Array,
    cu_seqlens_q: Array, *, scale: float | None = None, out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Causal attention of one to many queries a sequence over its pages (arXiv:2309.06180).

    Args:
        query: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16. Over a bfloat16 cache
            it is rounded to bfloat16, over a quantised one to int16 with a scale a head.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4; block_size is a multiple of 16, n_kv_heads divides n_heads.
        value_cache: like `key_cache`.
        block_tables: (num_seqs, max_blocks) int32; entries past a sequence's pages are not read.
        seq_lens: (num_seqs) int32: keys of each sequence, the queries' own tokens included.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens: 1 query a sequence is
            decoding, k + 1 is speculation, more is a chunk of a prompt.
        scale: factor of the scores; head_dim ** -0.5 by default.
        out: (out, lse).

    Returns:
        out (num_tokens, n_heads, head_dim) in query's dtype; lse (num_tokens, n_heads) float32.
        A row's bits depend on its own sequence alone: not on the batch, the chunk, the placement of
        pages, block_size or the number of threads.

    Example:
        >>> cache = np.ones((1, 1, 16, 2), np.float32)
        >>> query, ends = np.ones((1, 1, 2), np.float32), np.array([0, 1], np.int32)
        >>> table, lens = np.zeros((1, 1), np.int32), np.array([5], np.int32)
        >>> paged_attention(query, cache, cache, table, lens, ends)[0]
        array([[[1., 1.]]], dtype=float32)
    """
    if out is None:
        out = (_empty_like(query), _empty(query, _shape(query)[:2], np.float32))
    factor = 0.0 if scale is None else scale
    _core.paged_attention(
        query, key_cache, value_cache, block_tables, seq_lens, cu_seqlens_q, factor, *out
    )
    return out


def merge_attention(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Joins two attentions of the same queries over disjoint keys (arXiv:2501.01005).

    Args:
        out_a: (num_tokens, n_heads, head_dim) float32, float16 or bfloat16.
        lse_a: (num_tokens, n_heads) float32.
        out_b: like `out_a`.
        lse_b: like `lse_a`.
        out: (out, lse).

    Returns:
        (out, lse) as if the keys had been attended in one go.

    Example:
        >>> x, lse = np.ones((1, 1, 2), np.float32), np.zeros((1, 1), np.float32)
        >>> merge_attention(x, lse, 3 * x, lse)[0]
        array([[[2., 2.]]], dtype=float32)
    """
    if out is None:
        out = (_empty_like(out_a), _empty(out_a, _shape(out_a)[:2], np.float32))
    _core.merge_attention(out_a, lse_a, out_b, lse_b, *out)
    return out


def silu_and_mul(gate_up: Array, *, out: Array = None) -> Array:
    """SwiGLU's middle (arXiv:2002.05202): silu(gate) * up.

    Args:
        gate_up: (num_tokens, 2 * hidden_dim) float32, float16 or bfloat16: gate, then up.
        out: (num_tokens, hidden_dim) in the same dtype.

    Returns:
        (num_tokens, hidden_dim).

    Example:
        >>> silu_and_mul(np.array([[0, 5]], np.float32))
        array([[0.]], dtype=float32)
    """
    if out is None:
        out = _empty(gate_up, (_size(gate_up, 0), _size(gate_up, 1) // 2))
    _core.silu_and_mul(gate_up, out)
    return out


def copy_blocks(key_cache: Array, value_cache: Array, block_pairs: Array) -> None:
    """Copies whole pages of both caches, pair after pair, in place (copy-on-write).

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


def decoder_layer(
    x: Array, attention_norm: Array, q_proj: Array, k_proj: Array, v_proj: Array, o_proj: Array,
    mlp_norm: Array, gate_proj: Array, up_proj: Array, down_proj: Array, cos: Array, sin: Array,
    positions: Array, key_cache: Array, value_cache: Array, slot_mapping: Array,
    block_tables: Array, seq_lens: Array, cu_seqlens_q: Array, *,
    eps: float = 1e-5, interleaved: bool = False, out: Array = None,
) -> Array:  # fmt: skip
    """A whole layer of Llama (arXiv:2302.13971): the bits of the single ops one after another.

    Args:
        x: (num_tokens, dim) float32: the residual stream.
        attention_norm: (dim), any float dtype, as all weights here.
        q_proj: (n_heads * head_dim, dim).
        k_proj: (n_kv_heads * head_dim, dim) in q_proj's dtype.
        v_proj: like `k_proj`.
        o_proj: (dim, n_heads * head_dim).
        mlp_norm: (dim).
        gate_proj: (hidden_dim, dim).
        up_proj: like `gate_proj`.
        down_proj: (dim, hidden_dim).
        cos: (num_positions, head_dim / 2) float32; row p belongs to position p.
        sin: like `cos`.
        positions: (num_tokens) int32.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim), any float dtype, or `Quantized`
            in int8 or int4, quantised as it is written; written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32; -1 writes nothing of that token.
        block_tables: (num_seqs, max_blocks) int32.
        seq_lens: (num_seqs) int32, the tokens of this call included.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens.
        eps: of both norms.
        interleaved: as in `apply_rotary_pos_emb`.
        out: like `x`; may be `x`.

    Returns:
        (num_tokens, dim) float32: x + attention + mlp.

    Example:
        >>> x, norm, square = np.ones((1, 2), np.float32), np.ones(2, np.float32), np.eye(2)
        >>> square = square.astype(np.float32)
        >>> cos, sin = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
        >>> key_cache, value_cache = np.zeros((2, 1, 1, 16, 2), np.float32)
        >>> at, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        >>> decoder_layer(
        ...     x, norm, square, square, square, square, norm, square, square, 0 * square, cos, sin,
        ...     at, key_cache, value_cache, at, at[None], one, np.array([0, 1], np.int32), eps=0.0,
        ... )
        array([[2., 2.]], dtype=float32)
    """
    if out is None:
        out = _empty_like(x)
    inputs = (
        x, attention_norm, q_proj, k_proj, v_proj, o_proj, mlp_norm, gate_proj, up_proj, down_proj,
        cos, sin, positions, key_cache, value_cache, slot_mapping, block_tables, seq_lens,
        cu_seqlens_q,
    )  # fmt: skip
    _core.decoder_layer(inputs, eps, interleaved, out)
    return out
