"""Allocate the results of an op when the caller gives none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from codellama_rt.ops.dtypes import FLOATS
from codellama_rt.ops.native import _core
from codellama_rt.ops.quantized import Quantized

Array = Any  # numpy.ndarray, mindspore.Tensor, or what has __dlpack__

# Results are allocated before the arguments are checked. An argument that is not a tensor, or
# lacks an axis, gets some result here, and the op itself then reports what is wrong with it.


def shape_of(argument: Array) -> tuple[int, ...]:
    """Return the shape of a tensor; anything else counts as a scalar.

    So does a Quantized whose shape its payload cannot hold: no format has less than 4 bits per
    element.
    """
    if isinstance(argument, Quantized):
        fits = math.prod(argument.shape) <= 2 * argument.nbytes
        return tuple(argument.shape) if fits else ()
    if isinstance(argument, np.ndarray) or _is_mindspore(argument):
        return argument.shape
    return _core.shape_and_dtype(argument)[0] if hasattr(argument, "__dlpack__") else ()


def axis_size(argument: Array, axis: int) -> int:
    """Return the size of an axis, or 0 if the tensor has no such axis."""
    shape = shape_of(argument)
    return shape[axis] if axis < len(shape) else 0


def empty_like(argument: Array) -> Array:
    """Return an uninitialised result of the same kind, shape and dtype."""
    return empty(argument, shape_of(argument))


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Return an uninitialised result of `like`'s kind, in its dtype unless one is given.

    For tensors of other frameworks, which come by DLPack, it is a NumPy array.
    """
    if not _is_mindspore(like):
        return np.empty(shape, _numpy_dtype_of(like) if dtype is None else dtype)
    import mindspore

    name = str(like.dtype).lower() if dtype is None else np.dtype(dtype).name
    array = np.empty(shape, FLOATS[name].dtype if name in FLOATS else name)
    return mindspore.Tensor.from_numpy(array)


def _numpy_dtype_of(argument: Array) -> Any:
    """Return a tensor's dtype; float32 for what has none that a result may have."""
    if isinstance(argument, np.ndarray):
        return argument.dtype
    if not hasattr(argument, "__dlpack__"):
        return np.float32
    name = _core.shape_and_dtype(argument)[1]
    return FLOATS[name].dtype if name in FLOATS else np.float32


def _is_mindspore(argument: Array) -> bool:
    """Return whether this is a mindspore.Tensor; other frameworks' have no `asnumpy`."""
    return hasattr(argument, "data_ptr") and hasattr(argument, "asnumpy")
