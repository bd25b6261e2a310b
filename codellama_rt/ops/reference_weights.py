"""Quantised weights in NumPy: what `quantize` writes, and what each format's bytes encode.

The layouts are described in `quantized`; those of GGUF are in `reference_gguf`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.quantized import WEIGHT_GROUPS, WEIGHT_TILE, Quantized, rotate_rows
from codellama_rt.ops.reference_gguf import dequantize_gguf

Array = NDArray
_SHARING = {**WEIGHT_GROUPS, "int4": 64, "q2_k": 16}  # activations with one scale, if not 32


def quantize(weight: Array, dtype: str) -> Quantized:
    """Quantise `weight` (out_features, in_features) to int8 or int4, to the kernels' bytes."""
    rows, k = weight.shape
    size = WEIGHT_GROUPS[dtype]
    padded = np.zeros((-(-rows // WEIGHT_TILE) * WEIGHT_TILE, -(-k // size), size), np.float32)
    padded.reshape(len(padded), -1)[:rows, :k] = weight
    with np.errstate(all="ignore"):
        if dtype == "int8":
            padded = rotate_rows(padded, for_query=False)
        values, *scales = (_to_int8 if dtype == "int8" else _to_int4)(padded)
    tiles, groups = len(padded) // WEIGHT_TILE, padded.shape[1]
    # (tile, row, group, quad, element) -> (tile, group, quad, row, element)
    values = values.reshape(tiles, WEIGHT_TILE, groups, -1, 4).transpose(0, 2, 3, 1, 4)
    if dtype == "int4":
        values = values[:, :, :4] | values[:, :, 4:] << 4
    parts = [values.reshape(tiles, groups, -1)]
    for scale in scales[:1] if dtype == "int8" else scales[:2]:
        by_group = scale.reshape(tiles, WEIGHT_TILE, groups).transpose(0, 2, 1)
        parts.append(np.ascontiguousarray(by_group).view(np.uint8))
    payload = np.concatenate(parts, axis=-1).reshape(tiles, -1)
    if dtype == "int4":
        units = [
            np.ascontiguousarray(unit.reshape(tiles, -1)).view(np.uint8) for unit in scales[2:]
        ]
        payload = np.concatenate([*units, payload], axis=-1)
    return Quantized(payload.reshape(-1), dtype, (rows, k))


def _inverse(scale: Array) -> Array:
    """Return 1 / scale; 0 where that would overflow, and for NaN."""
    usable = np.abs(scale) >= np.float32(2**-120)
    return np.where(usable, np.float32(1) / np.where(usable, scale, np.float32(1)), np.float32(0))


def _rounded(x: Array, low: int, high: int) -> Array:
    """Round to nearest even, in [low, high]; NaN becomes low."""
    return np.where(np.isnan(x), np.float32(low), np.clip(np.rint(x), low, high))


def _to_int8(groups: Array) -> tuple[Array, Array]:
    """Return the values plus 128, and the scales in bfloat16."""
    import ml_dtypes

    largest = np.fmax.reduce(np.abs(groups), axis=-1)
    unit, best = _inverse(largest), np.full(largest.shape, np.inf, np.float32)
    scale = np.zeros_like(best)
    for trial in range(13):
        tried = (largest / np.float32(124 + trial / 2)).astype(ml_dtypes.bfloat16)
        tried = tried.astype(np.float32)
        squares = np.zeros_like(best)
        for w in np.moveaxis(groups, -1, 0):  # in the kernels' order
            error = (w - _rounded(w * _inverse(tried), -127, 127) * tried) * unit
            squares = squares + error * error
        better = squares < best
        best, scale = np.where(better, squares, best), np.where(better, tried, scale)
    scale = np.where(np.isfinite(groups).all(axis=-1), scale, np.float32(np.nan))
    values = _rounded(groups * _inverse(scale)[..., None], -127, 127).astype(np.int32) + 128
    return values.astype(np.uint8), scale.astype(ml_dtypes.bfloat16)


def _to_int4(groups: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return values, codes of scales and of minima, and each row's units of both."""
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    low, high = np.fmin(low, np.float32(0)), np.fmax(high, np.float32(0))
    step, depth = high / np.float32(15) - low / np.float32(15), -low
    finite = np.isfinite(groups).all(axis=(1, 2))
    units = [
        np.where(finite, part.max(axis=1), np.nan).astype(np.float32) / np.float32(255)
        for part in (step, depth)
    ]
    steps, depths = (
        _rounded(part * _inverse(unit)[:, None], 0, 255)
        for part, unit in zip((step, depth), units, strict=True)
    )
    factor = _inverse(steps.astype(np.float32) * units[0][:, None])[..., None]
    minimum = (depths.astype(np.float32) * units[1][:, None])[..., None]
    values = _rounded((groups + minimum) * factor, 0, 15)
    codes = (part.astype(np.uint8) for part in (values, steps, depths))
    return (*codes, units[0], np.float32(0) - units[1])


def dequantize(weight: Quantized, *, rotated: bool = False) -> Array:
    """Return the float64 (out_features, in_features) that `weight` encodes.

    Args:
        weight: of any format.
        rotated: return int8 as stored: groups rotated, the last one whole.
    """
    rows, k = weight.shape
    if weight.dtype not in WEIGHT_GROUPS:
        return dequantize_gguf(weight)
    payload = np.asarray(weight.payload).reshape(-1)
    size = WEIGHT_GROUPS[weight.dtype]
    tiles, groups = -(-rows // WEIGHT_TILE), -(-k // size)
    payload = payload.reshape(tiles, -1)
    values, scales, minima = (_from_int8 if weight.dtype == "int8" else _from_int4)(payload, groups)
    values = values.transpose(0, 3, 1, 2, 4).reshape(tiles, WEIGHT_TILE, groups, size)
    scales, minima = (part.transpose(0, 2, 1)[..., None] for part in (scales, minima))
    elements = values * scales + minima
    if weight.dtype == "int8":
        if rotated:
            return elements.reshape(tiles * WEIGHT_TILE, -1)[:rows]
        elements = rotate_rows(elements, for_query=True)
    return elements.reshape(tiles * WEIGHT_TILE, -1)[:rows, :k]


def _from_int8(payload: Array, groups: int) -> tuple[Array, Array, Array]:
    import ml_dtypes

    payload = payload.reshape(len(payload), groups, -1)
    end = WEIGHT_GROUPS["int8"] * WEIGHT_TILE
    values = payload[..., :end].reshape(*payload.shape[:2], -1, WEIGHT_TILE, 4).astype(float) - 128
    scales = np.ascontiguousarray(payload[..., end:]).view(ml_dtypes.bfloat16).astype(float)
    return values, scales, np.zeros_like(scales)


def _from_int4(payload: Array, groups: int) -> tuple[Array, Array, Array]:
    units = np.ascontiguousarray(payload[:, :128]).view(np.float32).reshape(-1, 1, 2, WEIGHT_TILE)
    payload = payload[:, 128:].reshape(len(payload), groups, -1)
    nibbles = payload[..., :256].reshape(*payload.shape[:2], 4, WEIGHT_TILE, 4)
    codes = payload[..., 256:].reshape(*payload.shape[:2], 2, WEIGHT_TILE)
    scaled = (codes.astype(np.float32) * units).astype(float)
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).astype(float)
    return values, scaled[:, :, 0], scaled[:, :, 1]


def rounded_to_int8(x: Array, weight_dtype: str) -> Array:
    """Return `x` (num_tokens, in_features) as `linear` rounds it for such a weight, in float64.

    Groups of 32 share a scale, max|x| / 127 in float32; a group that holds a NaN or an infinity is
    NaN. For int4 and int8 weights the groups are 64 long, for q2_k 16. For int8 they are rotated,
    and the last one is kept whole.
    """
    num_tokens, k = x.shape
    size = _SHARING.get(weight_dtype.removesuffix("_tiled"), 32)
    padded = np.zeros((num_tokens, -(-k // size), size), np.float32)
    padded.reshape(num_tokens, -1)[:, :k] = x
    with np.errstate(all="ignore"):
        if weight_dtype == "int8":
            padded = rotate_rows(padded, for_query=False)
        largest = np.abs(padded).max(axis=-1, keepdims=True)
        usable = largest >= np.float32(2**-100)
        factor = np.float32(127) / np.where(usable, largest, np.float32(1))
        values = np.where(usable, np.rint(padded * factor), 0).astype(np.float64)
        scale = np.where(usable, largest / np.float32(127), 0).astype(np.float64)
    rounded = np.where(np.isfinite(padded).all(axis=-1, keepdims=True), values * scale, np.nan)
    rounded = rounded.reshape(num_tokens, -1)
    return rounded if weight_dtype == "int8" else rounded[:, :k]
