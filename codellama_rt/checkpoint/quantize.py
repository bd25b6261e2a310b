"""Which tensors of a model are quantised (the projections and the head), and how.

Every step reads those tensors whole. Of the embedding it reads one row per token, and norms are
vectors: both stay floats. A head that is tied to the embedding becomes a quantised copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint.finiteness import require_finite, source_of
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.checkpoint.tensor_names import EMBEDDING, HEAD
from codellama_rt.ops.quantized import (
    OWN_WEIGHT_DTYPES,
    WEIGHT_TILE,
    Quantized,
    weight_num_bytes,
)

QUANTIZATIONS = OWN_WEIGHT_DTYPES
_BAND_BYTES = 2**22  # of rows in float32


def check_quantization(quantization: str | None) -> None:
    """Reject anything but None and the names in `QUANTIZATIONS`.

    Raises:
        ValueError: an unknown name.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )


def is_quantized(name: str) -> bool:
    """Return whether quantisation applies to the tensor of this name (Hugging Face's layout).

    Example:
        >>> is_quantized("model.layers.0.mlp.up_proj.weight")
        True
    """
    return name == HEAD or name.endswith("_proj.weight")


def sources(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the source of each tensor of the quantised model: a tied head's is the embedding."""
    return {**tensors, HEAD: tensors.get(HEAD, tensors[EMBEDDING])}


def quantize_tensor(
    tensor: StoredTensor, dtype: str, reorder: Callable[[np.ndarray], np.ndarray] | None = None
) -> Quantized:
    """Read one tensor and quantise it; its part of the mapped file is then released.

    It works on bands of rows, so that tensors in blocks are never whole in float32; tiles are
    independent.

    Args:
        tensor: (out_features, in_features), floats or one of GGUF's formats.
        dtype: one of `QUANTIZATIONS`.
        reorder: puts the rows into another order first.

    Raises:
        CheckpointError: a value is not finite; it would make its whole group NaN.
    """
    n_rows, row_size = tensor.shape
    payload, done = np.empty(weight_num_bytes(dtype, tensor.shape), np.uint8), 0
    tiles = max(1, _BAND_BYTES // (4 * row_size * WEIGHT_TILE))
    step = n_rows if reorder is not None else tiles * WEIGHT_TILE
    for begin in range(0, n_rows, step):
        rows = np.require(tensor.decode(begin, min(begin + step, n_rows)), requirements="CA")
        require_finite(rows, source_of(tensor), first_row=begin, purpose=" to quantise")
        band = ops.quantize(rows if reorder is None else reorder(rows), dtype).payload
        payload[done : done + band.nbytes] = band
        done += band.nbytes
    tensor.release()
    return Quantized(payload, dtype, tensor.shape)
