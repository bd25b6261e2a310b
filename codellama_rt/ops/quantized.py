"""Quantised tensors: bytes, and what they stand for. `csrc/quantized.h` has the same layouts in C++.

A cache in int8 or int4: a page of a head is block_size / 16 groups of 16 tokens, each group its
rows of values, then its scales; so a group is one piece, whatever block_size is.

* int8: a row is head_dim int8, a scale one float32 a token. x = value * scale.
* int4: a row is head_dim / 2 bytes, its scales `INT4_GROUPS` pairs (scale, minimum) of float16 a
  token. x = value * scale + minimum, value in 0..15.

A weight (out_features, in_features): int8 and int4 as `quantize` makes them, in tiles of 16 rows,
groups of 32 along in_features; q4_0, q4_1, q8_0, q4_k and q6_k as they lie in a GGUF file. Elements
of a group are in the order in which kernels multiply them: 4 of row 0, 4 of row 1, ... of row 15,
then the next 4 of each.

* int8: a group is 512 bytes, value + 128, then 16 bfloat16 scales. x = value * scale.
* int4: a tile begins with 16 float32 units of scales and 16 of minima, one a row. A group is 256
  bytes, elements 0 to 15 in the low and 16 to 31 in the high nibbles, then 16 + 16 bytes: scales and
  minima in those units. x = value * scale + minimum, value in 0..15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CACHE_DTYPES = ("int8", "int4")
OWN_WEIGHT_DTYPES = ("int8", "int4")  # that `quantize` makes
WEIGHT_DTYPES = (*OWN_WEIGHT_DTYPES, "q4_0", "q4_1", "q8_0", "q4_k", "q6_k")
CACHE_GROUP = 16  # tokens
INT4_GROUPS = 4  # of head_dim, in a row of an int4 cache
INT4_STEP = 8  # head_dim is a multiple of this in an int4 cache
WEIGHT_TILE = 16  # rows
WEIGHT_GROUP = 32  # elements of in_features with one scale
GGUF_BLOCKS = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34), "q4_k": (256, 144),
               "q6_k": (256, 210)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised cache or weight; ops take it where the float tensor would stand.

    Attributes:
        payload: uint8, contiguous, of any shape: values and scales.
        dtype: a name of `CACHE_DTYPES` or `WEIGHT_DTYPES`.
        shape: of the float tensor that it stands for.
    """

    payload: Any
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.payload.nbytes


def cache_row_bytes(dtype: str, head_dim: int) -> int:
    """Bytes that one token takes in one head of a quantised cache, its scales included."""
    if dtype == "int8":
        return head_dim + 4
    return head_dim // 2 + INT4_GROUPS * 4


def weight_num_bytes(dtype: str, shape: tuple[int, int]) -> int:
    """Bytes of a quantised weight (out_features, in_features)."""
    rows, k = shape
    if dtype in GGUF_BLOCKS:
        elements, num_bytes = GGUF_BLOCKS[dtype]
        return rows * (k // elements) * num_bytes
    padded_rows, groups = -(-rows // WEIGHT_TILE) * WEIGHT_TILE, -(-k // WEIGHT_GROUP)
    if dtype == "int8":
        return padded_rows * groups * (WEIGHT_GROUP + 2)
    return padded_rows * (8 + groups * (WEIGHT_GROUP // 2 + 2))
