"""The structs of csrc/ascend/tiling/tiling_data.h, and the plans that fill them."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64

import numpy as np

UB_BYTES = 192 * 1024
MAX_CORES = 64
UNIT_OVERHEAD = 64
Shares = c_int64 * (MAX_CORES + 1)


def _struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _integers(*names):
    return [(name, c_int64) for name in names]


RopeAndCache = _struct(
    "RopeAndCache",
    *_integers("num_tokens", "n_heads", "n_kv_heads", "head_dim", "block_size", "element_type",
               "chunk_heads"),
    ("tasks", Shares),
)  # fmt: skip
ReshapeAndCache = _struct(
    "ReshapeAndCache",
    *_integers("num_tokens", "n_kv_heads", "head_dim", "block_size", "chunk_heads"),
    ("tasks", Shares),
)
RmsNorm = _struct(
    "RmsNorm", *_integers("num_tokens", "dim", "element_type", "num_buffers"),
    ("eps", c_float), ("inverse_dim", c_float), ("tasks", Shares),
)  # fmt: skip
SiluAndMul = _struct(
    "SiluAndMul", *_integers("num_tokens", "hidden_dim", "element_type", "chunk"),
    ("tasks", Shares),
)  # fmt: skip
Unit = _struct("Unit", *_integers("row", "split", "sequence"))
PagedAttention = _struct(
    "PagedAttention",
    *_integers("num_tokens", "num_seqs", "max_blocks", "n_heads", "n_kv_heads", "head_dim",
               "block_size", "element_type", "split", "tile"),
    ("scale", c_float), ("padding", c_float), ("first", Unit * (MAX_CORES + 1)),
    ("open_slot", c_int64 * MAX_CORES), ("inherited_slot", c_int64 * MAX_CORES),
    ("num_slots", c_int64), ("slot_floats", c_int64),
)  # fmt: skip


class Plans:
    """Calls of plan.cpp; each gives (tiling, bytes of the unified buffer), or None if refused."""

    def __init__(self, library) -> None:
        self.library = library

    def _plan(self, struct, name, *arguments):
        tiling = struct()
        plan = getattr(self.library, f"clrt_plan_{name}")
        plan.restype = c_int64
        integers = [c_int64(a) if isinstance(a, int) else a for a in arguments]
        ub_bytes = plan(ctypes.byref(tiling), *integers)
        return None if ub_bytes < 0 else (tiling, ub_bytes)

    def rope_and_cache(self, *sizes):
        return self._plan(RopeAndCache, "rope_and_cache", *sizes)

    def reshape_and_cache(self, *sizes):
        return self._plan(ReshapeAndCache, "reshape_and_cache", *sizes)

    def rms_norm(self, *sizes):
        return self._plan(RmsNorm, "rms_norm", *sizes)

    def silu_and_mul(self, *sizes):
        return self._plan(SiluAndMul, "silu_and_mul", *sizes)

    def paged_attention(self, seq_lens, num_queries, heads, head_dim, block_size, cores):
        lens = np.asarray(seq_lens, np.int64)
        ends = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int64)
        max_blocks = -(-int(lens.max(initial=1)) // block_size)
        pointer = ctypes.POINTER(c_int64)
        return self._plan(
            PagedAttention, "paged_attention", len(lens), max_blocks, *heads, head_dim, block_size,
            lens.ctypes.data_as(pointer), ends.ctypes.data_as(pointer), cores,
        )  # fmt: skip
