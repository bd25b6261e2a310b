"""The operators of the dense layers, and a whole decoder layer, called directly."""

from __future__ import annotations

import numpy as np

from codellama_rt.ops.native import _core
from codellama_rt.ops.quantized import (
    GGUF_BLOCKS,
    OWN_WEIGHT_DTYPES,
    TILED,
    Quantized,
    weight_num_bytes,
)
from codellama_rt.ops.results import Array, axis_size, empty, empty_like

__all__ = [  # which codellama_rt.ops hands on
    "add_rms_norm",
    "decoder_layer",
    "embedding",
    "linear",
    "quantize",
    "repack",
    "rms_norm",
    "silu_and_mul",
]


def embedding(
    token_ids: Array, table: Array, *, out: Array = None, num_threads: int | None = None
) -> Array:
    """Return rows `token_ids` of a table.

    Args:
        token_ids: (num_tokens) int32, each in [0, vocab_size).
        table: (vocab_size, dim) float32, float16 or bfloat16, or a `Quantized` weight.
        out: (num_tokens, dim), any float dtype; float32 by default.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (num_tokens, dim).

    Example:
        >>> embedding(np.array([1], np.int32), np.eye(2, dtype=np.float32))
        array([[0., 1.]], dtype=float32)
    """
    if out is None:
        out = empty(token_ids, (axis_size(token_ids, 0), axis_size(table, 1)), np.float32)
    _core.embedding(token_ids, table, out, num_threads)
    return out


def rms_norm(
    x: Array, weight: Array, eps: float = 1e-5, *, out: Array = None, num_threads: int | None = None
) -> Array:
    """Return RMSNorm (arXiv:1910.07467) of x: x / sqrt(mean(x^2) + eps) * weight.

    The mean is accumulated in float32.

    Args:
        x: (num_tokens, dim) float32, float16 or bfloat16.
        weight: (dim), any float dtype.
        eps: added to the mean square.
        out: (num_tokens, dim) in x's dtype; may be `x`.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (num_tokens, dim) in x's dtype.

    Example:
        >>> rms_norm(np.full((1, 2), 3, np.float32), np.ones(2, np.float32), 0.0)
        array([[1., 1.]], dtype=float32)
    """
    if out is None:
        out = empty_like(x)
    _core.rms_norm(x, weight, eps, out, num_threads)
    return out


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-5,
    *,
    out: tuple[Array, Array] | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Return rms_norm(x + residual) and the sum, which continues the residual stream.

    Args:
        x: (num_tokens, dim) float32, float16 or bfloat16.
        residual: like `x`.
        weight: (dim), any float dtype.
        eps: added to the mean square.
        out: (normalized, sum), each like `x`; `(x, residual)` works in place.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (rms_norm(x + residual), x + residual).

    Example:
        >>> one = np.ones((1, 2), np.float32)
        >>> add_rms_norm(one, one, np.ones(2, np.float32), 0.0)[1]
        array([[2., 2.]], dtype=float32)
    """
    if out is None:
        out = (empty_like(x), empty_like(x))
    _core.add_rms_norm(x, residual, weight, eps, out[0], out[1], num_threads)
    return out


def linear(
    x: Array,
    weight: Array | tuple[Array, ...],
    *,
    out: Array = None,
    num_threads: int | None = None,
) -> Array:
    """Return x times weight transposed, accumulated in float32.

    The bits of a row do not depend on num_tokens.

    Args:
        x: (num_tokens, in_features) float32, float16 or bfloat16; rows may be strided. Over
            bfloat16 weights it is rounded to bfloat16 on CPUs with bfloat16 dot products.
        weight: (out_features, in_features) in the checkpoint's row order, any float dtype or
            `Quantized`. Over quantised weights x is rounded to int8 in groups of 32 (over q2_k:
            of 16; over int4: of 64; over int8: of 64, rotated). A tuple of up to three weights of
            one dtype is multiplied in one pass, as if their rows were concatenated.
        out: (num_tokens, out_features), any float dtype (default: x's); rows may be strided.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (num_tokens, out_features).

    Example:
        >>> linear(np.ones((1, 3), np.float32), np.ones((2, 3), np.float32))
        array([[3., 3.]], dtype=float32)
    """
    if isinstance(weight, list):  # which another thread may change while the op runs
        weight = tuple(weight)
    if out is None:
        weights = weight if isinstance(weight, tuple) else (weight,)
        out = empty(x, (axis_size(x, 0), sum(axis_size(w, 0) for w in weights)))
    _core.linear(x, weight, out, num_threads)
    return out


def quantize(weight: Array, dtype: str, *, num_threads: int | None = None) -> Quantized:
    """Quantise a weight to int8 or int4.

    int8 has one scale per 64 elements of a row; int4 a scale and a minimum per 32. int8 first
    rotates each group by a Hadamard matrix (arXiv:2404.00456), as `linear` rotates x: this spreads
    outliers over the group. A row that holds a NaN or an infinity becomes NaN, as do int8 values
    past 5e36. The bytes are the same on every instruction set.

    Args:
        weight: (out_features, in_features) float32, float16 or bfloat16.
        dtype: "int8" (8.25 bits per element) or "int4" (4.5 bits).
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        A weight for `linear` and `embedding`; its payload is the same kind of array as `weight`.

    Raises:
        ValueError: another target dtype, or a weight that is not a matrix.
        TypeError: the weight is not float32, float16 or bfloat16.

    Example:
        >>> quantized = quantize(np.eye(2, dtype=np.float32), "int8")
        >>> quantized.shape, quantized.nbytes
        ((2, 2), 1056)
    """
    if dtype not in OWN_WEIGHT_DTYPES:
        names = " or ".join(OWN_WEIGHT_DTYPES)
        raise ValueError(f"quantize: dtype must be {names}, got {dtype!r}")
    shape = (axis_size(weight, 0), axis_size(weight, 1))
    payload = empty(weight, (weight_num_bytes(dtype, shape),), np.uint8)
    quantized = Quantized(payload, dtype, shape)
    _core.quantize(weight, quantized, num_threads)
    return quantized


def repack(weight: Quantized, *, num_threads: int | None = None) -> Quantized:
    """Repack a weight in a format of GGUF into the order in which the kernels read it.

    Every value stays as it is, and so does every bit that `linear` and `embedding` compute of it.
    The bytes are as many, with the rows filled up to a multiple of 16, and the same on every
    instruction set.

    Args:
        weight: (out_features, in_features) in a dtype of `GGUF_BLOCKS`, blocks as in a file.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        The weight in dtype "q4_0_tiled" and the like; its payload is the same kind of array.

    Raises:
        TypeError: not a `Quantized`.
        ValueError: another dtype, or a payload of another size.

    Example:
        >>> repack(Quantized(np.zeros((16, 18), np.uint8), "q4_0", (16, 32))).dtype
        'q4_0_tiled'
    """
    if not isinstance(weight, Quantized):
        raise TypeError(f"repack: weight must be a Quantized, got {type(weight).__name__}")
    if weight.dtype not in GGUF_BLOCKS:
        names = ", ".join(GGUF_BLOCKS)
        raise ValueError(f"repack: weight must be in one of {names}, got {weight.dtype!r}")
    shape = (axis_size(weight, 0), axis_size(weight, 1))
    dtype = weight.dtype + TILED
    payload = empty(weight.payload, (weight_num_bytes(dtype, shape),), np.uint8)
    tiles = Quantized(payload, dtype, shape)
    _core.repack(weight, tiles, num_threads)
    return tiles


def silu_and_mul(gate_up: Array, *, out: Array = None, num_threads: int | None = None) -> Array:
    """Return silu(gate) * up, the middle of a SwiGLU layer (arXiv:2002.05202).

    Args:
        gate_up: (num_tokens, 2 * hidden_dim) float32, float16 or bfloat16: gate, then up.
        out: (num_tokens, hidden_dim) in the same dtype.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        (num_tokens, hidden_dim).

    Example:
        >>> silu_and_mul(np.array([[0, 5]], np.float32))
        array([[0.]], dtype=float32)
    """
    if out is None:
        out = empty(gate_up, (axis_size(gate_up, 0), axis_size(gate_up, 1) // 2))
    _core.silu_and_mul(gate_up, out, num_threads)
    return out


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
    out: Array = None,
    num_threads: int | None = None,
) -> Array:
    """Run a whole Llama layer (arXiv:2302.13971), bit for bit the result of its single ops.

    Args:
        x: (num_tokens, dim) float32: the residual stream.
        attention_norm: (dim), any float dtype, like all weights here.
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
        slot_mapping: (num_tokens) int32; -1 skips the token.
        block_tables: (num_seqs, max_blocks) int32.
        seq_lens: (num_seqs) int32, including the tokens of this call.
        cu_seqlens_q: (num_seqs + 1) int32, rising from 0 to num_tokens.
        eps: of both norms.
        interleaved: as in `apply_rotary_pos_emb`.
        out: like `x`; may be `x`.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

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
        out = empty_like(x)
    inputs = (
        x,
        attention_norm,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        mlp_norm,
        gate_proj,
        up_proj,
        down_proj,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        block_tables,
        seq_lens,
        cu_seqlens_q,
    )
    _core.decoder_layer(inputs, eps, interleaved, out, num_threads)
    return out
