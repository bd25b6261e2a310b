"""What the tests of operators share: instruction sets, seeds, guarded memory."""

import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from helpers.builders import running_on

from codellama_rt import ops
from codellama_rt.ops.dtypes import numpy_dtype

_GUARD = 64  # bytes on either side of an output
_GUARD_BYTE = 0xA5
_MAP_NORESERVE = 0x4000  # Linux; older Pythons have no name for it


@pytest.fixture(params=ops.available_isas())
def isa(request) -> Iterator[str]:
    """Each instruction set in turn; the chosen one is back afterwards."""
    with running_on(isa=request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the one of before is back afterwards."""
    with running_on():
        yield ops.set_num_threads


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230824)


@pytest.fixture
def guarded() -> Iterator[Callable[..., np.ndarray]]:
    """Makes outputs that start at an odd element; no byte before or after them may change."""
    buffers: list[tuple[np.ndarray, int, int]] = []

    def make(shape, dtype="float32") -> np.ndarray:
        element = np.dtype(dtype) if dtype == "uint8" else numpy_dtype(dtype)
        num_bytes = int(np.prod(shape)) * element.itemsize
        begin = _GUARD + element.itemsize
        memory = np.full(begin + num_bytes + _GUARD, _GUARD_BYTE, np.uint8)
        buffers.append((memory, begin, begin + num_bytes))
        return memory[begin : begin + num_bytes].view(element).reshape(shape)

    yield make
    for memory, begin, end in buffers:
        assert (memory[:begin] == _GUARD_BYTE).all(), "bytes before an output were written"
        assert (memory[end:] == _GUARD_BYTE).all(), "bytes after an output were written"


@pytest.fixture
def huge_cache() -> np.ndarray:
    """A float16 cache of 2^31 elements and two blocks; of its 4.3 GB only what is used exists."""
    shape = (2**20 + 2, 1, 16, 128)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * int(np.prod(shape)), flags=flags)
    return np.frombuffer(memory, np.float16).reshape(shape)
