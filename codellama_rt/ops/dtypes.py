"""Names of float element types, as checkpoints and callers write them, and NumPy's dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

FLOAT_DTYPES = ("float32", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another name.
    """
    if name not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {name!r}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
