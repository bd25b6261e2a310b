"""Results that an op makes where the caller gives none."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or mindspore.Tensor, contiguous

# Results are made before the arguments are checked: what is no tensor, or lacks an axis, gives some
# result here, and the op itself then says what is wrong with it.


def shape_of(argument: Array) -> tuple[int, ...]:
    """Of a tensor; of anything else, that of a scalar."""
    return getattr(argument, "shape", ())


def axis_size(argument: Array, axis: int) -> int:
    """How long an axis is; 0 where there is none."""
    shape = shape_of(argument)
    return shape[axis] if axis < len(shape) else 0


def empty_like(argument: Array) -> Array:
    """An uninitialised result of the same kind, shape and dtype."""
    return empty(argument, shape_of(argument))


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised result of the same kind as `like`, and of its dtype unless one is given."""
    if not hasattr(like, "data_ptr"):
        return np.empty(shape, getattr(like, "dtype", None) if dtype is None else dtype)
    import mindspore
    import ml_dtypes

    name = str(like.dtype).lower() if dtype is None else np.dtype(dtype).name
    array = np.empty(shape, ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return mindspore.Tensor.from_numpy(array)
