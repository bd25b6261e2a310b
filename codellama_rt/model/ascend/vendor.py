"""The same operators by MindSpore's own Ascend kernels: attention="vendor".

Huawei's fused attention uses the cube cores, which helps prefill and grouped heads; decoding
without groups is bound by memory either way. MindSpore has no CPU version of these kernels: tests
check the arguments they are called with. Caches are those of `codellama_rt.ops.ascend`, in blocks
of 128 tokens (BnNBsD in CANN's terms), with at most 2^31 - 1 elements, CANN's range of offsets.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

from codellama_rt.model.ascend.checks import check
from codellama_rt.model.ascend.ops import Lengths, Tensor, as_ints, check_lengths, require_halves

MAX_ELEMENTS = 2**31 - 1
COS_ROW_A_TOKEN = 2  # cos_format: (num_tokens, head_dim), halves repeated, not interleaved
CAUSAL_FROM_THE_END = 3  # sparse_mode: the mask aligns the last query with the last key
MASK_SIZE = 2048  # of the compressed mask that it takes, whatever the lengths


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Call `mindspore.ops.rms_norm`."""
    check("rms_norm", {"x": x, "weight": weight})
    return _mindspore().ops.rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Call `mindspore.ops.add_rms_norm`."""
    check("add_rms_norm", {"x": x, "residual": residual, "weight": weight})
    out, _, total = _mindspore().ops.add_rms_norm(x, residual, weight, eps)
    return out, total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Call `mindspore.ops.swiglu`."""
    check("silu_and_mul", {"gate_up": gate_up})
    return _mindspore().ops.swiglu(gate_up, -1)


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Call MindSpore's reshape_and_cache.

    It expects blocks of (block_size, heads, head_dim). A head-major block is such a block per head,
    with one head: so each head of a token is written like a token of its own.
    """
    tensors = {
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slot_mapping,
    }
    check("reshape_and_cache", tensors)
    require_offsets(key_cache)
    num_blocks, n_kv_heads, block_size, head_dim = key_cache.shape
    blocks = (num_blocks * n_kv_heads, block_size, 1, head_dim)
    _auto_generate().reshape_and_cache(
        key.reshape(-1, 1, head_dim),
        value.reshape(-1, 1, head_dim),
        key_cache.view(blocks),
        value_cache.view(blocks),
        slots_of_heads(slot_mapping, n_kv_heads, block_size),
    )


def slots_of_heads(slot_mapping: Tensor, n_kv_heads: int, block_size: int) -> Tensor:
    """Return the slot of each head of each token, (num_tokens * n_kv_heads) int32; -1 stays -1."""
    ms = _mindspore()
    slots = slot_mapping.reshape(-1, 1)
    heads = ms.ops.arange(n_kv_heads).astype(ms.int32).reshape(1, -1)
    block, row = slots // block_size, slots % block_size
    spread = (block * n_kv_heads + heads) * block_size + row
    return ms.ops.where(slots < 0, slots, spread).astype(ms.int32).reshape(-1)


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
    """Call MindSpore's apply_rotary_pos_emb_, then reshape_and_cache: three launches in all."""
    require_halves(interleaved)
    tensors = {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slot_mapping,
    }
    check("rope_and_cache", tensors)
    ms = _mindspore()
    num_tokens, width = qkv.shape
    n_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    kv_dim = n_kv_heads * head_dim
    query, key, value = ms.ops.split(qkv, [width - 2 * kv_dim, kv_dim, kv_dim], axis=1)
    rows = [table[positions].astype(qkv.dtype) for table in (cos, sin)]
    rows = [ms.ops.cat((row, row), axis=1) for row in rows]
    lengths = ms.ops.ones((num_tokens,), ms.int32)  # each token is a sequence of one
    query, key = _auto_generate().apply_rotary_pos_emb_(
        query.contiguous(), key.contiguous(), *rows, lengths, COS_ROW_A_TOKEN
    )
    heads = (num_tokens, n_kv_heads, head_dim)
    reshape_and_cache(
        key.reshape(heads), value.contiguous().reshape(heads), key_cache, value_cache, slot_mapping
    )
    return query.reshape(num_tokens, -1, head_dim)


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
    """Call MindSpore's fused_infer_attention_score over the block table.

    Adjacent sequences with one query each share a call; a sequence with several has a call of its
    own, so that nothing is padded. Where lengths already exclude keys, no mask is used.
    """
    lens, ends = as_ints(seq_lens), as_ints(cu_seqlens_q)
    tensors = {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": block_tables,
    }
    check("paged_attention", tensors, num_seqs=len(lens))
    check_lengths(query, key_cache, block_tables, lens, ends)
    require_offsets(key_cache)
    parts = []
    for first, last in _runs(ends):
        parts.append(
            _attend(
                query[ends[first] : ends[last]],
                key_cache,
                value_cache,
                block_tables[first:last],
                lens[first:last],
                scale,
            )
        )
    ms = _mindspore()
    return tuple(ms.ops.cat(list(pieces), axis=0) for pieces in zip(*parts, strict=True))


def _runs(ends: list[int]) -> list[tuple[int, int]]:
    """Return ranges of sequences, one per call; sequences without queries are in none."""
    runs: list[tuple[int, int]] = []
    counts = [b - a for a, b in pairwise(ends)]
    for i, count in enumerate(counts):
        if count == 1 and runs and runs[-1][1] == i and counts[i - 1] == 1:
            runs[-1] = (runs[-1][0], i + 1)
        elif count > 0:
            runs.append((i, i + 1))
    return runs


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lens: list[int],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend for sequences with equal numbers of queries; returns (tokens, heads, dim) and lse."""
    num_tokens, n_heads, head_dim = query.shape
    queries = num_tokens // len(lens)
    mask = {"atten_mask": _mask(), "sparse_mode": CAUSAL_FROM_THE_END} if queries > 1 else {}
    out, lse = _mindspore().ops.fused_infer_attention_score(
        query.reshape(len(lens), queries, n_heads, head_dim).swapaxes(1, 2).contiguous(),
        [key_cache],
        [value_cache],
        actual_seq_lengths=[queries] * len(lens),
        actual_seq_lengths_kv=lens,
        block_table=block_tables.contiguous(),
        num_heads=n_heads,
        scale=head_dim**-0.5 if scale is None else scale,
        input_layout="BNSD",
        num_key_value_heads=key_cache.shape[1],
        block_size=key_cache.shape[2],
        softmax_lse_flag=True,
        **mask,
    )
    out = out.reshape(len(lens), n_heads, queries, head_dim).swapaxes(1, 2)
    lse = lse.reshape(len(lens), n_heads, queries).swapaxes(1, 2)
    return out.reshape(query.shape), lse.reshape(num_tokens, n_heads)


def require_offsets(cache: Tensor) -> None:
    """Reject a cache that is beyond the range of CANN's 32-bit offsets.

    Raises:
        ValueError: it is too large.
    """
    elements = functools.reduce(lambda a, b: a * b, cache.shape)
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"a cache of {elements} elements is more than {MAX_ELEMENTS}, the most CANN's "
            "attention supports; use fewer blocks or attention='custom'"
        )


@functools.cache
def _mask() -> Tensor:
    ms = _mindspore()
    return ms.ops.triu(ms.ops.ones((MASK_SIZE, MASK_SIZE), ms.float32), 1).astype(ms.bool_)


def _mindspore() -> Any:
    import mindspore

    return mindspore


def _auto_generate() -> Any:
    from mindspore.ops import auto_generate

    return auto_generate
