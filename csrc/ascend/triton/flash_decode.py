"""The Triton twin of op_kernel/clrt_paged_attention.cpp: one query a sequence, split over its keys.

A second implementation of the same split and merge, for which Huawei publishes a compiler up to its
last step (compile.py). It is not used by the runtime. Layouts are the kernel's: query (num_seqs,
n_heads, head_dim), pages (num_blocks, n_kv_heads, block_size, head_dim); a program of `attend` is a
(sequence, key/value head, split), one of `merge` a (sequence, query head).
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every score


@triton.jit
def attend(
    query, key_cache, value_cache, block_tables, seq_lens, acc_out, max_out, sum_out, max_blocks,
    scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial results of one split: acc (num_seqs, n_heads, splits, head_dim), max, sum float32."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(seq_lens + sequence)
    group, dims, tokens = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_SIZE)
    rows = (sequence * n_kv_heads + head) * GROUP + group
    queries = tl.load(query + rows[:, None] * HEAD_DIM + dims[None, :])
    largest = tl.full((GROUP,), LOWEST, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    end = tl.minimum(length, (split + 1) * SPLIT)
    for begin in range(split * SPLIT, end, BLOCK_SIZE):
        page = tl.load(block_tables + sequence * max_blocks + begin // BLOCK_SIZE)
        offset = (page.to(tl.int64) * n_kv_heads + head) * BLOCK_SIZE * HEAD_DIM
        places = offset + tokens[:, None] * HEAD_DIM + dims[None, :]
        inside = begin + tokens < end
        keys = tl.load(key_cache + places, mask=inside[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(inside[None, :], scores, LOWEST)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        old = tl.exp(largest - larger)
        total = total * old + tl.sum(weights, 1)
        values = tl.load(value_cache + places, mask=inside[:, None], other=0.0)
        acc = acc * old[:, None] + tl.dot(weights.to(values.dtype), values)
        largest = larger
    slots = rows * num_splits + split
    tl.store(acc_out + slots[:, None] * HEAD_DIM + dims[None, :], acc)
    tl.store(max_out + slots, largest)
    tl.store(sum_out + slots, total)


@triton.jit
def merge(
    acc_in, max_in, sum_in, seq_lens, out, lse, num_splits, HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out and log-sum-exp of a query head, its splits in ascending order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = sequence * tl.num_programs(1) + head
    dims = tl.arange(0, HEAD_DIM)
    used = tl.cdiv(tl.load(seq_lens + sequence), SPLIT)
    first = row * num_splits
    largest = tl.load(max_in + first)
    total = tl.load(sum_in + first)
    acc = tl.load(acc_in + first * HEAD_DIM + dims)
    for split in range(1, used):
        slot = first + split
        other = tl.load(max_in + slot)
        larger = tl.maximum(largest, other)
        old, fresh = tl.exp(largest - larger), tl.exp(other - larger)
        total = total * old + tl.load(sum_in + slot) * fresh
        acc = acc * old + tl.load(acc_in + slot * HEAD_DIM + dims) * fresh
        largest = larger
    tl.store(out + row * HEAD_DIM + dims, (acc / total).to(out.dtype.element_ty))
    tl.store(lse + row, largest + tl.log(total))
