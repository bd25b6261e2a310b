"""Names of float dtypes in checkpoints and arguments, and the NumPy dtypes they stand for."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class FloatDtype(NamedTuple):
    """A dtype of floats.

    Attributes:
        dtype: NumPy's.
        encoding: its name in safetensors and GGUF files.
        storage: the class of its storages in PyTorch.
        ggml_type: its number in GGUF files.
        exponent_bits: a NaN or infinity has them all set.
    """

    dtype: np.dtype
    encoding: str
    storage: str
    ggml_type: int
    exponent_bits: int


FLOATS = {
    "float32": FloatDtype(np.dtype(np.float32), "F32", "FloatStorage", 0, 0x7F800000),
    "float16": FloatDtype(np.dtype(np.float16), "F16", "HalfStorage", 1, 0x7C00),
    "bfloat16": FloatDtype(np.dtype(ml_dtypes.bfloat16), "BF16", "BFloat16Storage", 30, 0x7F80),
}
FLOAT_DTYPES = tuple(FLOATS)
ENCODINGS = {known.encoding: known.dtype for known in FLOATS.values()}


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another name.
    """
    if name not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {name!r}")
    return FLOATS[name].dtype
