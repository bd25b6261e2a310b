"""Quantised tensors: bytes and what they stand for; in C++ `csrc/common/quantized.h`.

A cache in int8 or int4: a page of a head is block_size / 16 groups of 16 tokens, each group its
rows of values, then its scales; so a group is one piece, whatever block_size is.

* int8: a row is head_dim int8, a scale one float32 a token. x = value * scale.
* int4, values: a row is head_dim / 2 bytes, element 2 i in the low half of byte i; then a float16
  scale a token, then a float16 minimum a token. x = value * scale + minimum, value in 0..15.
* int4, keys: the row times a Hadamard matrix (`rotate_rows`), 5 bits an element: the low four as
  above, then rows of head_dim / 8 bytes with bit 4 of the elements of even number, then of odd
  number; scales and minimums as above.

A weight (out_features, in_features): int8 and int4 as `quantize` makes them, in tiles of 16 rows,
groups of 64 (int4: 32) along in_features; q4_0, q4_1, q8_0, q4_k and q6_k as they lie in a GGUF
file. Elements of a group are in the order in which kernels multiply them: 4 of row 0, 4 of row 1,
... of row 15, then the next 4 of each.

* int8: a group is 1024 bytes, value + 128, then 16 bfloat16 scales. The row's 64 elements times a
  Hadamard matrix (`rotate_rows`, its own inverse) are value * scale.
* int4: a tile begins with 16 float32 units of scales and 16 of minima, one a row. A group is 256
  bytes, elements 0 to 15 in the low and 16 to 31 in the high nibbles, then 16 + 16 bytes: scales
  and minima in those units. x = value * scale + minimum, value in 0..15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CACHE_DTYPES = ("int8", "int4")
OWN_WEIGHT_DTYPES = ("int8", "int4")  # that `quantize` makes
WEIGHT_DTYPES = (*OWN_WEIGHT_DTYPES, "q4_0", "q4_1", "q8_0", "q4_k", "q6_k")
CACHE_GROUP = 16  # tokens
INT4_STEP = 32  # head_dim is a multiple of this in an int4 cache
WEIGHT_TILE = 16  # rows
WEIGHT_GROUPS = {"int8": 64, "int4": 32}  # elements of in_features with one scale
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

    def copy(self) -> Quantized:
        """The same in memory of its own."""
        return Quantized(self.payload.copy(), self.dtype, self.shape)


def cache_row_bytes(dtype: str, head_dim: int) -> tuple[int, int]:
    """Bytes that one token takes in one head of a quantised cache, scales included.

    Args:
        dtype: a name of `CACHE_DTYPES`.
        head_dim: elements of a row; a multiple of `INT4_STEP` in int4.

    Returns:
        (of its key, of its value).

    Raises:
        ValueError: a head_dim that int4 does not have.

    Example:
        >>> cache_row_bytes("int8", 128), cache_row_bytes("int4", 128)
        ((132, 132), (84, 68))
    """
    if dtype == "int8":
        return head_dim + 4, head_dim + 4
    if head_dim % INT4_STEP:
        raise ValueError(
            f"an int4 cache must have head_dim a multiple of {INT4_STEP}, got {head_dim}"
        )
    return head_dim // 2 + head_dim // 8 + 4, head_dim // 2 + 4


def cache_item_size(dtype: str, head_dim: int, *, key: bool) -> float:
    """Bytes an element of a quantised cache of keys or of values takes, scales included."""
    return cache_row_bytes(dtype, head_dim)[0 if key else 1] / head_dim


def empty_caches(dtype: str, shape: tuple[int, int, int, int]) -> tuple[Quantized, Quantized]:
    """Zeroed pages of keys and of values.

    Args:
        dtype: a name of `CACHE_DTYPES`.
        shape: (num_blocks, n_kv_heads, block_size, head_dim).

    Returns:
        (key_cache, value_cache), payloads (num_blocks, n_kv_heads, bytes of a page).
    """
    num_blocks, n_kv_heads, block_size, head_dim = shape
    key, value = (
        Quantized(np.zeros((num_blocks, n_kv_heads, block_size * row), np.uint8), dtype, shape)
        for row in cache_row_bytes(dtype, head_dim)
    )
    return key, value


def weight_num_bytes(dtype: str, shape: tuple[int, int]) -> int:
    """Bytes of a quantised weight (out_features, in_features)."""
    rows, k = shape
    if dtype in GGUF_BLOCKS:
        elements, num_bytes = GGUF_BLOCKS[dtype]
        return rows * (k // elements) * num_bytes
    size = WEIGHT_GROUPS[dtype]
    padded_rows, groups = -(-rows // WEIGHT_TILE) * WEIGHT_TILE, -(-k // size)
    if dtype == "int8":
        return padded_rows * groups * (size + 2)
    return padded_rows * (8 + groups * (size // 2 + 2))


def read_cache(cache: Quantized, *, key: bool) -> np.ndarray:
    """The float32 numbers that the pages of a cache stand for: (num_blocks, ..., head_dim).

    Args:
        cache: pages of keys or of values, as `reshape_and_cache` writes them.
        key: which of the two they are.
    """
    head_dim = cache.shape[-1]
    row_bytes = cache_row_bytes(cache.dtype, head_dim)[0 if key else 1]
    groups = np.ascontiguousarray(cache.payload).reshape(-1, CACHE_GROUP * row_bytes)
    read = _read_int8 if cache.dtype == "int8" else _read_int4
    rows = read(groups, head_dim, key).reshape(-1, head_dim)
    if key and cache.dtype == "int4":
        rows = rotate_rows(rows, for_query=True)  # the inverse of the keys' own
    return rows.astype(np.float32).reshape(cache.shape)


def _read_int8(groups: np.ndarray, head_dim: int, key: bool) -> np.ndarray:
    values, scales = np.split(groups, [CACHE_GROUP * head_dim], axis=1)
    values = values.view(np.int8).reshape(-1, CACHE_GROUP, head_dim)
    return values * np.ascontiguousarray(scales).view(np.float32).astype(np.float64)[..., None]


def _read_int4(groups: np.ndarray, head_dim: int, key: bool) -> np.ndarray:
    ends = np.cumsum([CACHE_GROUP * head_dim // 2, CACHE_GROUP * head_dim // 8 if key else 0])
    low, high, scales = np.split(groups, ends, axis=1)
    low = low.reshape(-1, CACHE_GROUP, head_dim // 2)
    values = np.stack([low & 15, low >> 4], axis=-1)  # of even and odd elements
    if key:
        bits = np.unpackbits(high, axis=1, bitorder="little")
        values |= bits.reshape(-1, CACHE_GROUP, 2, head_dim // 2).swapaxes(2, 3) << 4
    values = values.reshape(-1, CACHE_GROUP, head_dim)
    halves = np.ascontiguousarray(scales).view(np.float16).astype(np.float64)
    scale, minimum = halves.reshape(-1, 2, CACHE_GROUP, 1).swapaxes(0, 1)
    return values * scale + minimum


def rotate_rows(x: np.ndarray, *, for_query: bool) -> np.ndarray:
    """`x` (..., n) times a Hadamard matrix, in its own dtype: the rotation of int4 keys.

    Blocks of the greatest power of two that divides n turn each by itself. The rotations of a key
    and of a query are each other's inverse, and leave their product as it was.
    """
    n = x.shape[-1]
    block, half = n & -n, 1
    out = x.reshape(-1, n)
    while half < block:
        pairs = out.reshape(-1, 2, half)
        out = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    log2 = block.bit_length() - 1
    factor = x.dtype.type(0.5 ** (log2 - log2 // 2 if for_query else log2 // 2))
    return (out * factor).reshape(x.shape)
