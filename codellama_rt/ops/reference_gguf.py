"""Weights in GGUF's formats in NumPy: what the bytes encode, in rows of blocks and in tiles.

The formats are ggml's; the tiles are described in `quantized`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.quantized import (
    GGUF_BLOCKS,
    GGUF_HALVES,
    TILED,
    TILED_DTYPES,
    WEIGHT_TILE,
    Quantized,
)

Array = NDArray


def dequantize_gguf(weight: Quantized) -> Array:
    """Return the float64 (out_features, in_features) that `weight` encodes, in rows or in tiles."""
    if weight.dtype in TILED_DTYPES:
        weight = unpack_tiles(weight)
    blocks = np.asarray(weight.payload).reshape(-1, GGUF_BLOCKS[weight.dtype][1])
    return _BLOCKS[weight.dtype](blocks).reshape(weight.shape)


# ---- blocks: (num_blocks, bytes) -> (num_blocks, elements) ----------------------------


def _half(blocks: Array, offset: int) -> Array:
    """Return the float16 at a byte offset, as a column."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float64)


def _nibbles(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float64)


def _q4_0(blocks: Array) -> Array:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _fives(words: Array) -> Array:
    """Return values of 5 bits: 4 bytes of fifth bits, then 16 of nibbles."""
    return _nibbles(words[:, 4:]) + 16 * np.unpackbits(words[:, :4], axis=1, bitorder="little")


def _q5_0(blocks: Array) -> Array:
    return _half(blocks, 0) * (_fives(blocks[:, 2:]) - 16)


def _q5_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _fives(blocks[:, 4:]) + _half(blocks, 2)


def _q8_0(blocks: Array) -> Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], float)


def _iq4_nl(blocks: Array) -> Array:
    return _half(blocks, 0) * _IQ4[_nibbles(blocks[:, 2:]).astype(int)]


def _pairs(packed: Array) -> Array:
    """Return the pairs of bits of halves of 32 bytes, as (blocks, groups of 16, elements)."""
    pairs = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return pairs.reshape(-1, 16, 16)


def _q2_k(blocks: Array) -> Array:
    values = _pairs(blocks[:, 16:80]).astype(float)
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    scales, minima = _half(blocks, 80) * scales, _half(blocks, 82) * minima
    return scales[..., None] * values - minima[..., None]


def _q3_k(blocks: Array) -> Array:
    thirds = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = _pairs(blocks[:, 32:96]) | thirds.reshape(-1, 16, 16) << 2
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    codes = np.concatenate([low & 15, low >> 4], axis=1)
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = _half(blocks, 108) * ((codes | upper << 4).astype(float) - 32)
    return scales[..., None] * (values.astype(float) - 4)


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Return the scales and minima of the groups of 32 of Q4_K and Q5_K."""
    first, second, third = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _q4_k(blocks: Array) -> Array:
    scales, minima = _k_scales(blocks)
    return scales * _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32) - minima


def _q5_k(blocks: Array) -> Array:
    scales, minima = _k_scales(blocks)
    fifths = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) + 16.0 * fifths
    return scales * values - minima


def _q6_k(blocks: Array) -> Array:
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    values = (low.reshape(-1, 16, 16) | _pairs(blocks[:, 128:192]) << 4).astype(np.float64) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return scales[..., None] * values


_BLOCKS: dict[str, Callable[[Array], Array]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


# ---- the same blocks in tiles ----------------------------------------------------------------


def _field_of_each_byte(dtype: str) -> list[tuple[int, int]]:
    """Return, for each byte of a block, where its field begins and the bytes of the field."""
    num_bytes, halves = GGUF_BLOCKS[dtype][1], GGUF_HALVES[dtype]
    if dtype in ("q4_k", "q5_k"):  # d and dmin make up a word
        halves = ()
    begin, fields = 0, []
    while begin < num_bytes:
        size = 2 if begin in halves else 4
        fields += [(begin, size)] * size
        begin += size
    return fields


def _bytes_in_tile(dtype: str) -> Array:
    """Return (rows, bytes of a block): where each byte of 16 blocks is in their tile."""
    rows = np.arange(WEIGHT_TILE)[:, None]
    begin, size = np.array(_field_of_each_byte(dtype)).T
    return WEIGHT_TILE * begin + rows * size + np.arange(len(begin)) - begin


def _with_own_order(dtype: str, blocks: Array, *, restore: bool) -> Array:
    """Return blocks (..., bytes) with the bits as tiles have them; or again as blocks have them."""
    blocks, words = blocks.copy(), GGUF_BLOCKS[dtype][1] - 20
    if dtype == "q8_0":
        blocks[..., 2:] ^= 128
    if dtype in ("q5_0", "q5_1"):
        bits = np.unpackbits(blocks[..., words : words + 4], axis=-1, bitorder="little")
        grid = bits.reshape(*bits.shape[:-1], *((4, 8) if restore else (8, 4))).swapaxes(-1, -2)
        bits = grid.reshape(bits.shape)
        blocks[..., words : words + 4] = np.packbits(bits, axis=-1, bitorder="little")
    return blocks


def repack(weight: Quantized) -> Quantized:
    """Return a weight in a format of GGUF as the kernels' bytes."""
    rows, k = weight.shape
    elements, num_bytes = GGUF_BLOCKS[weight.dtype]
    blocks = np.asarray(weight.payload).reshape(rows, k // elements, num_bytes)
    blocks = _with_own_order(weight.dtype, blocks, restore=False)
    last = np.minimum(np.arange(-(-rows // WEIGHT_TILE) * WEIGHT_TILE), rows - 1)
    tiles = blocks[last].reshape(-1, WEIGHT_TILE, k // elements, num_bytes).swapaxes(1, 2)
    payload = np.empty((*tiles.shape[:2], WEIGHT_TILE * num_bytes), np.uint8)
    payload[..., _bytes_in_tile(weight.dtype)] = tiles
    return Quantized(payload.reshape(-1), weight.dtype + TILED, weight.shape)


def unpack_tiles(weight: Quantized) -> Quantized:
    """Return the blocks that `repack` made tiles of."""
    rows, k = weight.shape
    dtype = weight.dtype.removesuffix(TILED)
    elements, num_bytes = GGUF_BLOCKS[dtype]
    payload = np.asarray(weight.payload).reshape(-1, k // elements, WEIGHT_TILE * num_bytes)
    tiles = payload[..., _bytes_in_tile(dtype)].swapaxes(1, 2)
    blocks = tiles.reshape(-1, k // elements, num_bytes)[:rows]
    blocks = _with_own_order(dtype, blocks, restore=True)
    return Quantized(blocks.reshape(rows, -1), dtype, weight.shape)
