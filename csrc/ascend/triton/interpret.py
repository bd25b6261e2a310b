"""Runs the twin under Triton's interpreter, on NumPy arrays: python interpret.py IN.npz OUT.npz.

IN has the arguments of ops.paged_attention for one query a sequence, OUT gets out and lse. The
interpreter multiplies no fewer than 16 rows, so n_heads / n_kv_heads must be 16 or more.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import flash_decode
import numpy as np

TYPES = {"float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
SPLIT = 128  # a multiple of the block size; short, so that short sequences have several


class Array:
    """A NumPy array with what the interpreter asks of a device's tensor; there is no copy."""

    device = None

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = TYPES[array.dtype.name]
        self.data = self

    def data_ptr(self) -> int:
        """Where it lies."""
        return self.array.ctypes.data

    def cpu(self) -> Array:
        """It is there."""
        return self

    def to(self, device: None) -> Array:
        """It is there."""
        return self

    def copy_(self, other: Array) -> None:
        """What was written is in place."""


def decode(
    query: np.ndarray, key_cache: np.ndarray, value_cache: np.ndarray, block_tables: np.ndarray,
    seq_lens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(out, lse) of one query a sequence."""
    num_seqs, n_heads, head_dim = query.shape
    _, n_kv_heads, block_size, _ = key_cache.shape
    num_splits = -(-int(seq_lens.max()) // SPLIT)
    acc = np.empty((num_seqs, n_heads, num_splits, head_dim), np.float32)
    partials = [acc, *(np.empty(acc.shape[:3], np.float32) for _ in range(2))]
    out, lse = np.empty_like(query), np.empty((num_seqs, n_heads), np.float32)
    pages = (key_cache, value_cache, block_tables, seq_lens)
    flash_decode.attend[num_seqs, n_kv_heads, num_splits](
        *map(Array, (query, *pages, *partials)), block_tables.shape[1], head_dim**-0.5,
        GROUP=n_heads // n_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLIT=SPLIT,
    )  # fmt: skip
    flash_decode.merge[num_seqs, n_heads](
        *map(Array, (*partials, seq_lens, out, lse)), num_splits, HEAD_DIM=head_dim, SPLIT=SPLIT
    )
    return out, lse


if __name__ == "__main__":
    out, lse = decode(**np.load(sys.argv[1]))
    np.savez(sys.argv[2], out=out, lse=lse)
