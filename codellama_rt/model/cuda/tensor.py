"""Tensors in device memory, owned by the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from codellama_rt.ops import native
from codellama_rt.ops.dtypes import numpy_dtype

_TYPESTR = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "uint8": "|u1"}
_DLPACK_CODE = {"float32": 2, "float16": 2, "bfloat16": 4, "int32": 0, "uint8": 1}


def element(dtype: str) -> np.dtype:
    """Return the NumPy dtype of a DeviceTensor's dtype name."""
    return np.dtype(dtype) if dtype in ("int32", "uint8") else numpy_dtype(dtype)


class Memory:
    """A range of device memory, freed when nothing refers to it any more."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate; RuntimeError if there is not enough memory."""
        self.num_bytes = num_bytes
        self.pointer = 0
        self._device = native.cuda()
        self.pointer = self._device.allocate(max(num_bytes, 1))

    def __del__(self) -> None:
        """Free the memory."""
        if self.pointer:
            self._device.release(self.pointer)


class DeviceTensor:
    """A contiguous tensor on the device; the cuda ops read and write it.

    Attributes:
        device_ptr: address of its first element.
        shape: sizes of its axes.
        dtype: "float32", "float16", "bfloat16", "int32" or "uint8".
        owner: the object that keeps the memory allocated.
    """

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: str, owner: Any) -> None:
        """View memory that `owner` keeps allocated."""
        self.device_ptr, self.shape, self.dtype, self.owner = pointer, tuple(shape), dtype, owner

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * element(self.dtype).itemsize

    def is_contiguous(self) -> bool:
        """Return True: every DeviceTensor is contiguous."""
        return True

    def reshape(self, *shape: int) -> DeviceTensor:
        """Return the same memory in another shape."""
        view = DeviceTensor(self.device_ptr, shape, self.dtype, self.owner)
        if view.size != self.size:
            raise ValueError(f"a tensor of shape {self.shape} cannot be reshaped to {shape}")
        return view

    def rows(self, begin: int, end: int) -> DeviceTensor:
        """Return rows [begin, end) of the first axis, sharing memory."""
        if not 0 <= begin <= end <= self.shape[0]:
            raise ValueError(f"rows {begin} to {end} of a tensor of shape {self.shape}")
        row_bytes = self.nbytes // self.shape[0]
        shape = (end - begin, *self.shape[1:])
        return DeviceTensor(self.device_ptr + begin * row_bytes, shape, self.dtype, self.owner)

    def numpy(self) -> np.ndarray:
        """Return a copy on the host, after all work on the current stream."""
        array = np.empty(self.shape, element(self.dtype))
        module = native.cuda()
        module.copy_async(array.ctypes.data, self.device_ptr, array.nbytes)
        module.synchronize()
        return array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Numba's protocol, version 3; it does not support bfloat16 (DLPack does)."""
        if self.dtype not in _TYPESTR:
            raise AttributeError(f"__cuda_array_interface__ does not support {self.dtype}")
        return {
            "shape": self.shape,
            "typestr": _TYPESTR[self.dtype],
            "strides": None,
            "version": 3,
            "data": (self.device_ptr, False),
            "stream": None,
        }

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """Return the tensor for torch.from_dlpack and others; memory is shared and kept alive."""
        bits = element(self.dtype).itemsize * 8
        code = _DLPACK_CODE[self.dtype]
        return native.cuda().dlpack(self.device_ptr, list(self.shape), code, bits, self)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (CUDA, 0): the first visible device."""
        return 2, 0


def empty(shape: tuple[int, ...], dtype: str) -> DeviceTensor:
    """Return an uninitialised tensor in its own memory."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * element(dtype).itemsize
    memory = Memory(num_bytes)
    return DeviceTensor(memory.pointer, shape, dtype, memory)


def to_device(array: np.ndarray) -> DeviceTensor:
    """Copy a host array to the device.

    Example:
        >>> to_device(np.ones(3, np.float32)).numpy()  # doctest: +SKIP
        array([1., 1., 1.], dtype=float32)
    """
    array = np.ascontiguousarray(array)
    tensor = empty(array.shape, array.dtype.name)
    module = native.cuda()
    module.copy_async(tensor.device_ptr, array.ctypes.data, array.nbytes)
    module.synchronize()
    return tensor


def copy(to: DeviceTensor, array: np.ndarray) -> None:
    """Copy a host array into a tensor; complete on return."""
    if array.nbytes != to.nbytes:
        raise ValueError(f"{array.nbytes} bytes for a tensor of {to.nbytes}")
    array = np.ascontiguousarray(array)
    module = native.cuda()
    module.copy_async(to.device_ptr, array.ctypes.data, array.nbytes)
    module.synchronize()
