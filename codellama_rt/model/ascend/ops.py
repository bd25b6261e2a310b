"""The operators of an Ascend NPU: MindSpore Tensors in, MindSpore Tensors out.

Names and meanings are those of `codellama_rt.ops`; the kernels are those of csrc/ascend, called in
MindSpore's PyNative mode. Tensors are float16 or bfloat16, all of a call the same; RoPE rotates
halves, not interleaved pairs. Shapes and dtypes are checked here (ValueError, TypeError); indices
in device memory (positions, slots, block numbers) are not, because reading them would stall the
device. Calls are asynchronous: a kernel's failure appears when a result is read.

`ops.available("ascend")` says whether these ops can run; if not, each raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

from codellama_rt.model.ascend.checks import check
from codellama_rt.ops import ascend_library

Tensor = Any  # mindspore.Tensor
Lengths = Any  # NumPy array, list or (synchronising) Tensor of int


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight: x (num_tokens, dim), weight (dim)."""
    check("rms_norm", {"x": x, "weight": weight})
    return _glue().rms_norm(x, weight, float(eps))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) of s = x + residual, rounded to their dtype; (num_tokens, dim)."""
    check("add_rms_norm", {"x": x, "residual": residual, "weight": weight})
    out, total = _glue().add_rms_norm(x, residual, weight, float(eps))
    return out, total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: (num_tokens, 2 * hidden_dim) -> (num_tokens, hidden_dim)."""
    check("silu_and_mul", {"gate_up": gate_up})
    return _glue().silu_and_mul(gate_up)


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write key and value (num_tokens, n_kv_heads, head_dim) into their slots; -1: skip."""
    check(
        "reshape_and_cache",
        {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": slot_mapping,
        },
    )
    _glue().reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate query and key of qkv, write key and value to their slots and return the query.

    Args:
        qkv: (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim).
        cos: (num_positions, head_dim / 2) float32.
        sin: like `cos`.
        positions: (num_tokens) int32, rows of the tables.
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim); written.
        value_cache: like `key_cache`; written.
        slot_mapping: (num_tokens) int32; -1 skips the token.
        interleaved: must be False.

    Returns:
        (num_tokens, n_heads, head_dim).

    Raises:
        ValueError: inconsistent shapes, or interleaved pairs.
        TypeError: a wrong dtype.
    """
    require_halves(interleaved)
    check(
        "rope_and_cache",
        {
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": slot_mapping,
        },
    )
    return _glue().rope_and_cache(qkv, cos, sin, positions, key_cache, value_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Lengths,
    cu_seqlens_q: Lengths,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally over blocks, split over the vector cores; returns (out, lse).

    Args:
        query: (num_tokens, n_heads, head_dim).
        key_cache: (num_blocks, n_kv_heads, block_size, head_dim).
        value_cache: like `key_cache`.
        block_tables: (num_seqs, max_blocks) int32.
        seq_lens: (num_seqs) in host memory: the division of work depends on them.
        cu_seqlens_q: (num_seqs + 1) in host memory, rising from 0 to num_tokens.
        scale: factor of the scores; head_dim ** -0.5 by default.

    Returns:
        out (num_tokens, n_heads, head_dim) in query's dtype; lse (num_tokens, n_heads) float32.
    """
    lens, ends = as_ints(seq_lens), as_ints(cu_seqlens_q)
    check(
        "paged_attention",
        {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_tables": block_tables,
        },
        num_seqs=len(lens),
    )
    check_lengths(query, key_cache, block_tables, lens, ends)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _glue().paged_attention(
        query, key_cache, value_cache, block_tables, lens, ends, factor
    )
    return out, lse


def as_ints(lengths: Lengths) -> list[int]:
    """Return Python ints of an array, a list or (waiting for the device) a Tensor."""
    if hasattr(lengths, "asnumpy"):
        lengths = lengths.asnumpy()
    return [int(n) for n in lengths]


def check_lengths(
    query: Tensor, key_cache: Tensor, block_tables: Tensor, lens: Sequence[int], ends: Sequence[int]
) -> None:
    """Check that each sequence's length covers its queries and fits its table.

    Raises:
        ValueError: one does not.
    """
    rises = all(a <= b for a, b in pairwise(ends))
    if len(ends) != len(lens) + 1 or ends[0] != 0 or ends[-1] != query.shape[0] or not rises:
        raise ValueError(
            f"paged_attention: cu_seqlens_q must rise from 0 to num_tokens={query.shape[0]} in "
            f"{len(lens) + 1} steps, got {list(ends)}"
        )
    most = block_tables.shape[1] * key_cache.shape[2]
    for i, length in enumerate(lens):
        if not ends[i + 1] - ends[i] <= length <= most:
            raise ValueError(
                f"paged_attention: seq_lens[{i}]={length} must be at least its queries "
                f"({ends[i + 1] - ends[i]}) and at most max_blocks * block_size = {most}"
            )


def require_halves(interleaved: bool) -> None:
    """Reject interleaved RoPE pairs.

    Raises:
        ValueError: they were requested.
    """
    if interleaved:
        raise ValueError(
            "rope_and_cache: the Ascend kernels rotate halves, not interleaved pairs; "
            "use the checkpoint in Hugging Face's layout"
        )


def _glue() -> ModuleType:
    return ascend_library.load(ascend_library.folder())
