"""Where weights lie that are made or copied when a model is opened: together, in huge pages.

NumPy asks for huge pages from 4 MiB on, and the weights of a small model are smaller. A step of
SmolLM2-135M with one sequence, quantised as it was opened, took 9.7 ms in pages of 4 KiB and 7.6 ms
in huge ones with int8, 5.7 and 4.7 ms with int4 (AMD EPYC, family 25 model 17, one thread).
"""

from __future__ import annotations

import numpy as np

from codellama_rt.checkpoint.stored_tensor import Weight
from codellama_rt.ops.native import map_huge_pages
from codellama_rt.ops.quantized import Quantized

_NUMPYS_BYTES = 2**22  # from which NumPy asks for huge pages itself
_CHUNK_BYTES = 2**25
_ALIGNMENT = 64  # a cache line, and a vector of AVX-512


class WeightMemory:
    """Chunks of memory that weights are copied into; each lives as long as a weight in it."""

    def __init__(self) -> None:
        self._chunk, self._used = np.empty(0, np.uint8), 0

    def keep(self, weight: Weight) -> Weight:
        """Return the weight in huge pages: a copy, or itself if it is large enough to be there."""
        if isinstance(weight, Quantized):
            return Quantized(self._keep(weight.payload), weight.dtype, weight.shape)
        return self._keep(weight)

    def copy(self, weight: Weight) -> Weight:
        """Return a read-only copy of the weight in huge pages."""
        if isinstance(weight, Quantized):
            return Quantized(self._copy(weight.payload), weight.dtype, weight.shape)
        return self._copy(weight)

    def _copy(self, array: np.ndarray) -> np.ndarray:
        copied = self._keep(array.copy() if array.nbytes >= _NUMPYS_BYTES else array)
        copied.flags.writeable = False
        return copied

    def _keep(self, array: np.ndarray) -> np.ndarray:
        if array.nbytes >= _NUMPYS_BYTES or array.nbytes == 0:
            return array
        if self._used + array.nbytes > self._chunk.nbytes:
            self._chunk, self._used = map_huge_pages(_CHUNK_BYTES), 0
        memory = self._chunk[self._used : self._used + array.nbytes]
        self._used += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        kept = memory.view(array.dtype).reshape(array.shape)
        kept[...] = array
        kept.flags.writeable = array.flags.writeable
        return kept
