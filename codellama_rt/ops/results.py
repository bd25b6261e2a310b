"""Allocate the results of an op when the caller gives none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from codellama_rt.ops.dtypes import FLOATS
from codellama_rt.ops.quantized import Quantized

Array = Any  # numpy.ndarray or mindspore.Tensor, contiguous

# Results are allocated before the arguments are checked. An argument that is not a tensor, or
# lacks an axis, gets some result here, and the op itself then reports what is wrong with it.


def shape_of(argument: Array) -> tuple[int, ...]:
    """Return the shape of a tensor; anything else counts as a scalar.

    So does a Quantized whose shape its payload cannot hold: no format has less than 2 bits per
    element.
    """
    if isinstance(argument, Quantized):
        fits = math.prod(argument.shape) <= 4 * argument.nbytes
        return tuple(argument.shape) if fits else ()
    return argument.shape if isinstance(argument, np.ndarray) or _is_mindspore(argument) else ()


def axis_size(argument: Array, axis: int) -> int:
    """Return the size of an axis, or 0 if the tensor has no such axis."""
    shape = shape_of(argument)
    return shape[axis] if axis < len(shape) else 0


def empty_like(argument: Array) -> Array:
    """Return an uninitialised result of the same kind, shape and dtype."""
    return empty(argument, shape_of(argument))


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Return an uninitialised result of `like`'s kind, in its dtype unless one is given."""
    if not _is_mindspore(like):
        usual = like.dtype if isinstance(like, np.ndarray) else np.float32
        return np.empty(shape, usual if dtype is None else dtype)
    import mindspore

    name = str(like.dtype).lower() if dtype is None else np.dtype(dtype).name
    array = np.empty(shape, FLOATS[name].dtype if name in FLOATS else name)
    return mindspore.Tensor.from_numpy(array)


def _is_mindspore(argument: Array) -> bool:
    """Return whether this is a mindspore.Tensor; other frameworks' have no `asnumpy`."""
    return hasattr(argument, "data_ptr") and hasattr(argument, "asnumpy")
