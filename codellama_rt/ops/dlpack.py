"""Results for other frameworks: NumPy arrays, bfloat16 included, through DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from codellama_rt.ops.native import _core

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
