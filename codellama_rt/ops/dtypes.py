"""Names of float dtypes in checkpoints and arguments, and the NumPy dtypes they stand for."""

from __future__ import annotations

import ml_dtypes
import numpy as np

FLOAT_DTYPES = ("float32", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another name.
    """
    if name not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {name!r}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
