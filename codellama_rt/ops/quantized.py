"""Quantised tensors: the bytes and what they encode; in C++ `csrc/common/quantized.h`.

An int8 or int4 cache: one head's part of a block is block_size / 16 groups of 16 tokens. A group
holds its rows of values, then its scales, contiguously and independent of block_size.

* int8: a row is head_dim int8 with one float32 scale per token. x = value * scale.
* int4, values: a row is head_dim / 2 bytes, element 2 i in the low half of byte i; then one float16
  scale per token, then one float16 minimum per token. x = value * scale + minimum, value in 0..15.
* int4, keys: the row times a Hadamard matrix (`rotate_rows`), 5 bits per element: the low four as
  above, then rows of head_dim / 8 bytes with bit 4 of the even elements, then of the odd elements;
  scales and minimums as above.

A weight (out_features, in_features): int8 and int4 as `quantize` writes them, in tiles of 16 rows
and groups of 64 (int4: 32) along in_features; those of `GGUF_BLOCKS` in the layout of GGUF files,
or, with `_tiled` after the name, as `repack` writes them. Elements of a group are in the order in
which kernels multiply them: 4 of row 0, 4 of row 1, ... of row 15, then the next 4 of each.

* int8: a group is 1024 bytes, value + 128, then 16 bfloat16 scales. value * scale is the row's 64
  elements times a Hadamard matrix (`rotate_rows`, its own inverse).
* int4: a tile begins with 16 float32 units of scales and 16 of minima, one per row. A group is 256
  bytes, elements 0 to 15 in the low and 16 to 31 in the high nibbles, then 16 + 16 bytes: scales
  and minima in those units. x = value * scale + minimum, value in 0..15.
* q4_0_tiled and the others: tiles of 16 rows, the last one filled up with the last row. A group of
  32 (q2_k: 16) has its values as unsigned integers: nibbles, elements 0 to 15 in the low ones; then
  words of 4 bytes per row: pairs of bits, those of elements 16 i + 4 j + b in bits 2 j of byte b of
  word i; single bits, that of element 4 q + b in bit q of byte b. 5 bits are a nibble and a single
  bit, 3 a pair and a single bit, 6 a nibble and a pair, 8 a byte (q8_0: plus 128). Formats of 32
  elements have the rows' scales, and minima, in front of a group. In K-quants the scales of the
  blocks follow a tile's groups, the last block first: for each of its fields those of the 16 rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codellama_rt.ops.dtypes import FLOATS
from codellama_rt.ops.native import map_huge_pages

CACHE_DTYPES = ("int8", "int4")
OWN_WEIGHT_DTYPES = ("int8", "int4")  # written by `quantize`
GGUF_BLOCKS = {  # elements and bytes of a block
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "iq4_nl": (32, 18),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
GGUF_HALVES = {  # where a block has its float16: scales, then minima
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "iq4_nl": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
TILED = "_tiled"
TILED_DTYPES = tuple(name + TILED for name in GGUF_BLOCKS)  # written by `repack`
WEIGHT_DTYPES = (*OWN_WEIGHT_DTYPES, *GGUF_BLOCKS, *TILED_DTYPES)
CACHE_GROUP = 16  # tokens
INT4_STEP = 32  # head_dim is a multiple of this in an int4 cache
WEIGHT_TILE = 16  # rows
WEIGHT_GROUPS = {"int8": 64, "int4": 32}  # elements of in_features per scale
MAX_ELEMENTS = 2**48  # so that products of sizes stay within 64 bits (kMaxElements in C++)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised cache or weight; ops accept it in place of a float tensor.

    Attributes:
        payload: uint8, contiguous, of any shape: values and scales. That of a cache, shaped
            (num_blocks, n_kv_heads, bytes), may be a view with gaps between these two axes.
        dtype: a name of `CACHE_DTYPES` or `WEIGHT_DTYPES`.
        shape: of the float tensor that it encodes.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is negative, or there are more than 2**48 elements.
    """

    payload: Any
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Reject a shape that no memory holds; ops check that the payload has its bytes."""
        check_shape(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of values and scales."""
        return self.payload.nbytes

    def copy(self) -> Quantized:
        """Return a copy in its own memory."""
        return Quantized(self.payload.copy(), self.dtype, self.shape)


def check_shape(shape: Sequence[int]) -> None:
    """Reject sizes that are not integers, negative, or multiply to more than `MAX_ELEMENTS`.

    A size of 0 counts as 1, since kernels multiply the others.

    Raises:
        TypeError: a size is not an integer.
        ValueError: the sizes are out of range.
    """
    try:
        sizes = [operator.index(size) for size in shape]
    except TypeError:
        raise TypeError(f"Quantized: shape must be a tuple of integers, got {shape!r}") from None
    if any(size < 0 for size in sizes) or math.prod(max(n, 1) for n in sizes) > MAX_ELEMENTS:
        raise ValueError(
            "Quantized: shape must have no size below 0 and at most 2**48 elements, "
            f"got {tuple(sizes)}"
        )


def cache_row_bytes(dtype: str, head_dim: int) -> tuple[int, int]:
    """Return the bytes per token and head of a quantised cache, scales included.

    Args:
        dtype: a name of `CACHE_DTYPES`.
        head_dim: elements of a row; a multiple of `INT4_STEP` in int4.

    Returns:
        (bytes of a key, bytes of a value).

    Raises:
        ValueError: int4 with a head_dim that is not a multiple of `INT4_STEP`.

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
    """Return the bytes per element of a quantised cache of keys or values, scales included."""
    return cache_row_bytes(dtype, head_dim)[0 if key else 1] / head_dim


def empty_caches(
    dtype: str, shape: tuple[int, int, int, int]
) -> tuple[np.ndarray | Quantized, np.ndarray | Quantized]:
    """Return zeroed blocks of keys and of values, as the attention operators take them.

    Their memory is in huge pages where the system has them; none is committed yet.

    Args:
        dtype: "float32", "float16", "bfloat16", or "int8" or "int4".
        shape: (num_blocks, n_kv_heads, block_size, head_dim); block_size is a multiple of 16.

    Returns:
        (key_cache, value_cache): NumPy arrays, or `Quantized` whose payloads are
        (num_blocks, n_kv_heads, bytes per block and head).

    Raises:
        TypeError: a size is not an integer.
        ValueError: another dtype, or a shape that no cache has.
        MemoryError: the system does not provide the memory.

    Example:
        >>> key_cache, value_cache = empty_caches("int8", (4, 2, 64, 128))
        >>> key_cache.shape, key_cache.payload.shape
        ((4, 2, 64, 128), (4, 2, 8448))
    """
    if dtype not in FLOATS and dtype not in CACHE_DTYPES:
        names = ", ".join((*FLOATS, *CACHE_DTYPES))
        raise ValueError(f"empty_caches: dtype must be one of {names}, got {dtype!r}")
    check_shape(shape)
    if len(shape) != 4 or shape[2] == 0 or shape[2] % CACHE_GROUP:
        raise ValueError(
            "empty_caches: shape must be (num_blocks, n_kv_heads, block_size, head_dim) with "
            f"block_size a multiple of {CACHE_GROUP}, got {tuple(shape)}"
        )
    if dtype in FLOATS:
        return _zeros(shape, FLOATS[dtype].dtype), _zeros(shape, FLOATS[dtype].dtype)
    num_blocks, n_kv_heads, block_size, head_dim = shape
    key, value = (
        Quantized(_zeros((num_blocks, n_kv_heads, block_size * row), np.uint8), dtype, shape)
        for row in cache_row_bytes(dtype, head_dim)
    )
    return key, value


def _zeros(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes == 0:
        return np.zeros(shape, dtype)
    try:
        return map_huge_pages(num_bytes).view(dtype).reshape(shape)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"no memory for a cache of {num_bytes / 1e9:.1f} GB ({error})") from None


def weight_num_bytes(dtype: str, shape: tuple[int, int]) -> int:
    """Return the bytes of a quantised weight (out_features, in_features)."""
    rows, k = shape
    padded_rows = -(-rows // WEIGHT_TILE) * WEIGHT_TILE
    if dtype not in WEIGHT_GROUPS:
        elements, num_bytes = GGUF_BLOCKS[dtype.removesuffix(TILED)]
        return (padded_rows if dtype in TILED_DTYPES else rows) * (k // elements) * num_bytes
    size = WEIGHT_GROUPS[dtype]
    groups = -(-k // size)
    if dtype == "int8":
        return padded_rows * groups * (size + 2)
    return padded_rows * (8 + groups * (size // 2 + 2))


def read_cache(cache: Quantized, *, key: bool) -> np.ndarray:
    """Return the float32 values that a cache encodes: (num_blocks, ..., head_dim).

    Args:
        cache: blocks of keys or of values, as `reshape_and_cache` writes them.
        key: True for keys, False for values.
    """
    head_dim = cache.shape[-1]
    row_bytes = cache_row_bytes(cache.dtype, head_dim)[0 if key else 1]
    groups = np.ascontiguousarray(cache.payload).reshape(-1, CACHE_GROUP * row_bytes)
    read = _read_int8 if cache.dtype == "int8" else _read_int4
    rows = read(groups, head_dim, key).reshape(-1, head_dim)
    if key and cache.dtype == "int4":
        rows = rotate_rows(rows, for_query=True)  # the inverse of the rotation of keys
    return rows.astype(np.float32).reshape(cache.shape)


def _read_int8(groups: np.ndarray, head_dim: int, key: bool) -> np.ndarray:
    values, scales = np.split(groups, [CACHE_GROUP * head_dim], axis=1)
    values = values.view(np.int8).reshape(-1, CACHE_GROUP, head_dim)
    return values * np.ascontiguousarray(scales).view(np.float32).astype(np.float64)[..., None]


def _read_int4(groups: np.ndarray, head_dim: int, key: bool) -> np.ndarray:
    ends = np.cumsum([CACHE_GROUP * head_dim // 2, CACHE_GROUP * head_dim // 8 if key else 0])
    low, high, scales = np.split(groups, ends, axis=1)
    low = low.reshape(-1, CACHE_GROUP, head_dim // 2)
    values = np.stack([low & 15, low >> 4], axis=-1)  # even and odd elements
    if key:
        bits = np.unpackbits(high, axis=1, bitorder="little")
        values |= bits.reshape(-1, CACHE_GROUP, 2, head_dim // 2).swapaxes(2, 3) << 4
    values = values.reshape(-1, CACHE_GROUP, head_dim)
    halves = np.ascontiguousarray(scales).view(np.float16).astype(np.float64)
    scale, minimum = halves.reshape(-1, 2, CACHE_GROUP, 1).swapaxes(0, 1)
    return values * scale + minimum


def rotate_rows(x: np.ndarray, *, for_query: bool) -> np.ndarray:
    """Return `x` (..., n) times a Hadamard matrix, in x's dtype: the rotation of int4 keys.

    Runs of the largest power of two that divides n are rotated independently. The rotations of keys
    and of queries are inverse to each other and preserve the scores.
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
