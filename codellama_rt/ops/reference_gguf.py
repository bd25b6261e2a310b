"""Weights in GGUF's formats in NumPy: what the bytes encode, in rows of blocks and in tiles.

The formats are ggml's; the tiles are described in `quantized`. A block is integers, and for each
group of them a scale and a minimum: x = (integer - zero) * scale + minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.quantized import (
    GGUF_BLOCKS,
    TILED,
    TILED_DTYPES,
    WEIGHT_TILE,
    Quantized,
)

Array = NDArray


class Fields(NamedTuple):
    """Runs of fields of one size in a block that have to do with scales: where, and how many."""

    size: int
    at: int
    count: int


class Format(NamedTuple):
    """How blocks encode values.

    Attributes:
        bits: of an integer.
        zero: the integer that stands for 0, or the minimum.
        integers: (num_blocks, bytes) to (num_blocks, elements) uint8.
        scales: (num_blocks, bytes) to scales, and minima or 0; (num_blocks, groups) float64.
        fields: that `scales` reads.
        group: elements that a tile has in one piece.
    """

    bits: int
    zero: int
    integers: Callable[[Array], Array]
    scales: Callable[[Array], tuple[Array, Array | float]]
    fields: tuple[Fields, ...]
    group: int = 32


def dequantize_gguf(weight: Quantized) -> Array:
    """Return the float64 (out_features, in_features) that `weight` encodes, in rows or in tiles."""
    rows, k = weight.shape
    dtype = weight.dtype.removesuffix(TILED)
    format_ = _FORMATS[dtype]
    if weight.dtype in TILED_DTYPES:
        integers, blocks = _unpack_tiles(weight)
    else:
        blocks = np.asarray(weight.payload).reshape(-1, GGUF_BLOCKS[dtype][1])
        integers = format_.integers(blocks)
    values = _IQ4[integers] if dtype == "iq4_nl" else integers.astype(float) - format_.zero
    scales, minima = format_.scales(blocks)
    grouped = values.reshape(*scales.shape, -1) * scales[..., None] + np.asarray(minima)[..., None]
    return grouped.reshape(-1, k)[:rows]


# ---- integers: (num_blocks, bytes) -> (num_blocks, elements) ---------------------------------


def _nibbles(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fives(words: Array) -> Array:
    """Return integers of 5 bits: 4 bytes of fifth bits, then 16 of nibbles."""
    fifths = np.unpackbits(words[:, :4], axis=1, bitorder="little")
    return _nibbles(words[:, 4:]) | fifths << 4


def _pairs(packed: Array) -> Array:
    """Return the pairs of bits of halves of 32 bytes: (num_blocks, elements)."""
    pairs = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return pairs.reshape(len(packed), -1)


def _bits(packed: Array) -> Array:
    """Return bit g of each of 32 bytes, of group after group: (num_blocks, elements)."""
    return (packed[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(packed), -1)


def _k_nibbles(packed: Array) -> Array:
    """Return those of each 32 bytes: low, then high ones."""
    return _nibbles(packed.reshape(len(packed), 4, 32)).reshape(len(packed), -1)


def _q6_nibbles(packed: Array) -> Array:
    """Return those of each 64 bytes: low, then high ones."""
    return _nibbles(packed.reshape(len(packed), 2, 64)).reshape(len(packed), -1)


# ---- scales and minima: (num_blocks, bytes) -> (num_blocks, groups) --------------------------


def _half(blocks: Array, offset: int) -> Array:
    """Return the float16 at a byte offset, as a column."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float64)


def _one_scale(blocks: Array) -> tuple[Array, float]:
    return _half(blocks, 0), 0.0


def _scale_and_minimum(blocks: Array) -> tuple[Array, Array]:
    return _half(blocks, 0), _half(blocks, 2)


def _q2_scales(blocks: Array) -> tuple[Array, Array]:
    return _half(blocks, 80) * (blocks[:, :16] & 15), -_half(blocks, 82) * (blocks[:, :16] >> 4)


def _q3_scales(blocks: Array) -> tuple[Array, float]:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _half(blocks, 108) * ((_nibbles(low) | upper << 4).astype(float) - 32), 0.0


def _q4_scales(blocks: Array) -> tuple[Array, Array]:
    first, second, third = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q6_scales(blocks: Array) -> tuple[Array, float]:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), 0.0


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], float)
_D = (Fields(2, 0, 1),)
_D_AND_M = (Fields(2, 0, 2),)
_K_HEAD = (Fields(2, 0, 2), Fields(4, 4, 3))
_FORMATS = {
    "q4_0": Format(4, 8, lambda b: _nibbles(b[:, 2:]), _one_scale, _D),
    "q4_1": Format(4, 0, lambda b: _nibbles(b[:, 4:]), _scale_and_minimum, _D_AND_M),
    "q5_0": Format(5, 16, lambda b: _fives(b[:, 2:]), _one_scale, _D),
    "q5_1": Format(5, 0, lambda b: _fives(b[:, 4:]), _scale_and_minimum, _D_AND_M),
    "q8_0": Format(8, 128, lambda b: b[:, 2:] ^ 128, _one_scale, _D),
    "iq4_nl": Format(4, 0, lambda b: _nibbles(b[:, 2:]), _one_scale, _D),
    "q2_k": Format(
        2, 0, lambda b: _pairs(b[:, 16:80]), _q2_scales, (Fields(2, 80, 2), Fields(1, 0, 16)), 16
    ),
    "q3_k": Format(
        3,
        4,
        lambda b: _pairs(b[:, 32:96]) | _bits(b[:, :32]) << 2,
        _q3_scales,
        (Fields(2, 108, 1), Fields(4, 96, 3)),
    ),
    "q4_k": Format(4, 0, lambda b: _k_nibbles(b[:, 16:]), _q4_scales, _K_HEAD),
    "q5_k": Format(
        5, 0, lambda b: _k_nibbles(b[:, 48:]) | _bits(b[:, 16:48]) << 4, _q4_scales, _K_HEAD
    ),
    "q6_k": Format(
        6,
        32,
        lambda b: _q6_nibbles(b[:, :128]) | _pairs(b[:, 128:192]) << 4,
        _q6_scales,
        (Fields(2, 208, 1), Fields(1, 192, 16)),
    ),
}


# ---- tiles -----------------------------------------------------------------------------------


def repack(weight: Quantized) -> Quantized:
    """Return a weight in a format of GGUF as the kernels' bytes."""
    rows, k = weight.shape
    format_, (elements, num_bytes) = _FORMATS[weight.dtype], GGUF_BLOCKS[weight.dtype]
    blocks = np.asarray(weight.payload).reshape(rows, -1, num_bytes)
    last = np.minimum(np.arange(-(-rows // WEIGHT_TILE) * WEIGHT_TILE), rows - 1)
    tiles = blocks[last].reshape(-1, WEIGHT_TILE, k // elements, num_bytes)
    integers = format_.integers(tiles.reshape(-1, num_bytes))
    # (tile, row, group, quad, element) -> (tile, group, quad, row, element)
    quads = integers.reshape(len(tiles), WEIGHT_TILE, k // format_.group, -1, 4)
    values = _packed(quads.transpose(0, 2, 3, 1, 4), format_.bits)
    scales = np.concatenate(  # (tile, block, bytes of 16 rows)
        [
            tiles[..., at : at + size * count]
            .reshape(*tiles.shape[:3], count, size)
            .transpose(0, 2, 3, 1, 4)
            .reshape(len(tiles), k // elements, -1)
            for size, at, count in format_.fields
        ],
        axis=-1,
    )
    if elements == 32:
        payload = np.concatenate([scales, values], axis=-1)
    else:
        flat = [part.reshape(len(tiles), -1) for part in (values, scales[:, ::-1])]
        payload = np.concatenate(flat, axis=-1)
    return Quantized(payload.reshape(-1), weight.dtype + TILED, weight.shape)


def _packed(quads: Array, bits: int) -> Array:
    """Return the bytes of groups' integers (tile, group, quad, row, element)."""
    count, parts = quads.shape[2], []
    if bits == 8:
        parts.append(quads)
    if 4 <= bits < 8:
        parts.append(quads[:, :, : count // 2] & 15 | (quads[:, :, count // 2 :] & 15) << 4)
    if bits in (2, 3, 6):
        pairs = (quads >> (4 if bits == 6 else 0) & 3).reshape(*quads.shape[:2], -1, 4, 16, 4)
        parts.append(sum(pairs[:, :, :, j] << 2 * j for j in range(4)))
    if bits in (3, 5):
        ones = quads >> (bits - 1) & 1
        parts.append(sum(ones[:, :, q : q + 1] << q for q in range(count)))
    return np.concatenate([p.reshape(*quads.shape[:2], -1) for p in parts], axis=-1, dtype=np.uint8)


def _unpacked(values: Array, bits: int, count: int) -> Array:
    """Return the integers (tile, group, quad, row, element) of groups' bytes."""
    words = values.reshape(*values.shape[:2], -1, WEIGHT_TILE, 4)
    if bits == 8:
        return words
    quads, at = np.zeros((*values.shape[:2], count, WEIGHT_TILE, 4), np.uint8), 0
    if bits >= 4:
        quads |= _at_quads(
            words, [(q % (count // 2), q // (count // 2) * 4) for q in range(count)], 15
        )
        at = count // 2
    if bits in (2, 3, 6):
        pairs = _at_quads(words, [(at + q // 4, q % 4 * 2) for q in range(count)], 3)
        quads |= pairs << (4 if bits == 6 else 0)
        at += count // 4
    if bits in (3, 5):
        quads |= _at_quads(words, [(at, q) for q in range(count)], 1) << (bits - 1)
    return quads


def _at_quads(words: Array, places: list[tuple[int, int]], mask: int) -> Array:
    """Return what each quad has in a word, from a bit on."""
    return np.stack([words[:, :, word] >> bit & mask for word, bit in places], axis=2)


def _unpack_tiles(weight: Quantized) -> tuple[Array, Array]:
    """Return the integers of all blocks, rows filled up, and blocks that have the scales alone."""
    rows, k = weight.shape
    dtype = weight.dtype.removesuffix(TILED)
    format_, (elements, num_bytes) = _FORMATS[dtype], GGUF_BLOCKS[dtype]
    num_tiles, num_blocks, groups = -(-rows // WEIGHT_TILE), k // elements, k // format_.group
    payload = np.asarray(weight.payload).reshape(num_tiles, -1)
    size = WEIGHT_TILE * sum(field.size * field.count for field in format_.fields)
    if elements == 32:
        scales, values = np.split(payload.reshape(num_tiles, groups, -1), [size], axis=-1)
    else:
        values, scales = np.split(payload, [payload.shape[1] - num_blocks * size], axis=1)
        values = values.reshape(num_tiles, groups, -1)
        scales = scales.reshape(num_tiles, num_blocks, size)[:, ::-1]
    quads = _unpacked(values, format_.bits, format_.group // 4)
    integers = quads.transpose(0, 3, 1, 2, 4).reshape(-1, elements)
    blocks, begin = np.zeros((num_tiles, WEIGHT_TILE, num_blocks, num_bytes), np.uint8), 0
    for size, at, count in format_.fields:
        part = scales[..., begin : begin + WEIGHT_TILE * size * count]
        fields = part.reshape(num_tiles, num_blocks, count, WEIGHT_TILE, size)
        blocks[..., at : at + size * count] = fields.transpose(0, 3, 1, 2, 4).reshape(
            num_tiles, WEIGHT_TILE, num_blocks, -1
        )
        begin += part.shape[-1]
    return integers, blocks.reshape(-1, num_bytes)
