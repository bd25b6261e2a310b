"""Allocate the results of an op when the caller gives none; hand them to other frameworks."""

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

    So does a Quantized whose shape its payload cannot hold: no format has less than 2 bits per
    element.
    """
    if isinstance(argument, Quantized):
        fits = math.prod(argument.shape) <= 4 * argument.nbytes
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


_CPU = 1  # DLPack's device types


class _Exported:
    """An array that other frameworks read by `from_dlpack`."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's (device type, device id)."""
        return _CPU, 0

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a capsule that shares the array's memory.

        Raises:
            BufferError: for another device, a dtype that DLPack does not have, or a read-only array
                and a consumer that does not know of these.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on the CPU, not on DLPack's device {dl_device}")
        array = self._array.copy() if copy else self._array
        return _core.dlpack_capsule(array, max_version is not None and max_version[0] >= 1)


def as_dlpack(array: np.ndarray) -> Any:
    """Return what `from_dlpack` of PyTorch, JAX and others reads a NumPy array from, uncopied.

    NumPy's own export refuses bfloat16, which it knows through `ml_dtypes` alone; this one does
    not.

    Args:
        array: any shape and strides; bool, complex and structured dtypes are refused.

    Raises:
        TypeError: not a NumPy array.

    Example:
        >>> np.from_dlpack(as_dlpack(np.ones(2, np.float32)))
        array([1., 1.], dtype=float32)
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"as_dlpack takes a NumPy array, got {type(array).__name__}")
    return _Exported(array)
