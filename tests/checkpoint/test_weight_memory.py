"""Weights made at opening: in huge pages, with the values, dtypes and flags that they had."""

import numpy as np
import pytest
from helpers.builders import normal
from helpers.huge_pages import advised_huge_pages

from codellama_rt import ops
from codellama_rt.checkpoint.weight_memory import WeightMemory
from codellama_rt.ops.dtypes import FLOAT_DTYPES


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_small_weights_lie_in_huge_pages(dtype):
    memory, rng = WeightMemory(), np.random.default_rng(7)
    weights = [normal(rng, shape, dtype) for shape in [(3, 5), (700, 64), (9,)]]
    weights[1].flags.writeable = False
    for weight in weights:
        kept = memory.keep(weight)
        assert kept.dtype == weight.dtype
        assert kept.shape == weight.shape
        assert kept.tobytes() == weight.tobytes()
        assert kept.flags.writeable == weight.flags.writeable
        assert kept.ctypes.data % 64 == 0
        assert advised_huge_pages(kept.ctypes.data)


def test_a_quantised_weight_keeps_its_dtype_and_shape():
    weight = ops.quantize(normal(np.random.default_rng(7), (40, 64)), "int8")
    kept = WeightMemory().keep(weight)
    assert (kept.dtype, kept.shape) == (weight.dtype, weight.shape)
    assert kept.payload.tobytes() == weight.payload.tobytes()
    assert advised_huge_pages(kept.payload.ctypes.data)


@pytest.mark.parametrize("rows", [40, 2**17])  # these are in huge pages by NumPy
def test_a_copy_is_read_only_and_in_huge_pages(rows):
    array = np.arange(rows * 32, dtype=np.uint8).reshape(rows, 32)
    for weight in (array, ops.quantize(array.astype(np.float32), "int8")):
        copied = WeightMemory().copy(weight)
        assert (copied.dtype, copied.shape) == (weight.dtype, weight.shape)
        ours, theirs = (getattr(one, "payload", one) for one in (copied, weight))
        assert not ours.flags.writeable
        assert not np.shares_memory(ours, theirs)
        assert ours.tobytes() == theirs.tobytes()
        assert advised_huge_pages(ours.ctypes.data)


def test_large_and_empty_weights_stay_where_they_are():
    for weight in (np.zeros(2**22, np.uint8), np.zeros((0, 4), np.float32)):
        assert WeightMemory().keep(weight) is weight


def test_more_weights_than_a_chunk_holds():
    memory, weight = WeightMemory(), np.arange(3 * 2**20, dtype=np.uint8)
    kept = [memory.keep(weight) for _ in range(25)]
    assert all(np.array_equal(array, weight) for array in kept)
    assert len({array.ctypes.data for array in kept}) == len(kept)
