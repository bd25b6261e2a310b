"""int8 and int4 weights in the order of the device's matrix instructions.

Layout: csrc/cuda/linear/formats.cuh. Along in_features, 32 elements share a float16 scale: int8:
largest magnitude / 127; int4: the element of largest magnitude / -8, so that it is exact.
"""

from __future__ import annotations

import numpy as np

FORMATS = {"int8": "int8_mma", "int4": "int4_mma"}
_ROWS, _CHUNK, _GROUP = 16, 64, 32


def quantize(weight: np.ndarray, name: str) -> np.ndarray:
    """Return the payload of an `ops.Quantized` of dtype int8_mma or int4_mma.

    Args:
        weight: (out_features, in_features), any float dtype; in_features a multiple of 64.
        name: "int8" or "int4".

    Returns:
        uint8, (tiles of 16 rows, chunks of 64, bytes per tile).

    Raises:
        ValueError: another name, or in_features not a multiple of 64.
    """
    if name not in FORMATS:
        raise ValueError(f"weights on cuda must be quantised to int8 or int4, got {name!r}")
    if weight.shape[1] % _CHUNK:
        raise ValueError(f"in_features must be a multiple of {_CHUNK}, got {weight.shape[1]}")
    values, scales = _round(weight.astype(np.float32), name)
    tiles = _tiles(values)  # (tiles, chunks, 16 rows, 2 groups, 4 lanes, 8 elements)
    if name == "int8":
        # (tiles, chunks, half, g, t, group, element)
        body = tiles.reshape(*tiles.shape[:2], 2, 8, 2, 4, 8).transpose(0, 1, 2, 3, 5, 4, 6)
        packed = np.ascontiguousarray(body).view(np.uint8)
    else:
        packed = _pack_nibbles(tiles.reshape(*tiles.shape[:2], 2, 8, 2, 4, 8))
    packed = packed.reshape(*tiles.shape[:2], -1)
    return np.concatenate([packed, _tile_scales(scales)], axis=-1)


def _round(weight: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values int8 (rows, k), padded to 16 rows; scales float16 (rows, groups)."""
    weight = np.pad(weight, ((0, -len(weight) % _ROWS), (0, 0)))
    groups = weight.reshape(len(weight), -1, _GROUP)
    if name == "int8":
        scales, lowest, highest = np.abs(groups).max(-1) / 127, -127, 127
    else:
        largest = np.abs(groups).argmax(-1)[..., None]
        scales = np.take_along_axis(groups, largest, -1)[..., 0] / -8
        lowest, highest = -8, 7
    scales = scales.astype(np.float16)
    divisor = scales.astype(np.float32)[..., None]
    ratio = np.divide(groups, divisor, out=np.zeros_like(groups), where=divisor != 0)
    values = np.clip(np.rint(ratio), lowest, highest)
    return values.astype(np.int8).reshape(weight.shape), scales


def _tiles(values: np.ndarray) -> np.ndarray:
    rows, k = values.shape
    tiles = values.reshape(rows // _ROWS, _ROWS, k // _CHUNK, 2, 4, 8)
    return tiles.transpose(0, 2, 1, 3, 4, 5)


def _tile_scales(scales: np.ndarray) -> np.ndarray:
    rows, groups = scales.shape
    tiles = scales.reshape(rows // _ROWS, _ROWS, groups // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(*tiles.shape[:2], -1)


def _pack_nibbles(tiles: np.ndarray) -> np.ndarray:
    """Reorder (tiles, chunks, half, g, group, t, element) to words [g][t][half][group]."""
    nibbles = (tiles + 8).astype(np.uint32).transpose(0, 1, 3, 5, 2, 4, 6)
    shifts = np.array([4 * (e // 2) + 16 * (e % 2) for e in range(8)], np.uint32)
    words = np.ascontiguousarray((nibbles << shifts).sum(-1, dtype=np.uint32))
    return words.view(np.uint8)
