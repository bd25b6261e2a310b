"""The KV cache's memory: its layout, its size, and how many blocks are planned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.builders import int32
from helpers.tolerances import assert_equal_bits

from codellama_rt.llm import kv_plan
from codellama_rt.llm.kv_plan import plan_num_blocks
from codellama_rt.llm.plan import Plan
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache, bytes_per_token
from codellama_rt.ops import Quantized
from codellama_rt.ops.quantized import CACHE_DTYPES, cache_row_bytes

CONFIG = ModelConfig(
    n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, dim=32, hidden_dim=16, vocab_size=10,
    max_position_embeddings=1000,
)  # fmt: skip
WIDE = replace(CONFIG, head_dim=128)
PAGE_BYTES = 2 * 3 * 2 * 16 * 8 * 2  # keys and values, layers, heads, tokens, elements, float16


ASKED = Plan(kv_dtype="float16", block_size=16, max_num_seqs=2)


def plan(weight_bytes=0, **changes):
    return plan_num_blocks(CONFIG, replace(ASKED, **changes), weight_bytes)


@pytest.fixture
def free_memory(monkeypatch):
    """Sets what the machine has free."""
    return lambda num_bytes: monkeypatch.setattr(kv_plan, "available_bytes", lambda: num_bytes)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_layout(dtype, itemsize):
    cache = KVCache(CONFIG, num_blocks=5, block_size=32, dtype=dtype)
    assert len(cache.layers) == 3
    for keys, values in cache.layers:
        for pages in (keys, values):
            assert pages.shape == (5, 2, 32, 8)
            assert pages.dtype.name == dtype
            assert pages.flags.c_contiguous
            assert pages.flags.writeable
            assert not pages.astype(np.float32).any()
    assert cache.num_bytes == 2 * 3 * 5 * 2 * 32 * 8 * itemsize
    assert bytes_per_token(CONFIG, dtype) == 2 * 3 * 2 * 8 * itemsize


def test_no_two_arrays_share_memory():
    cache = KVCache(CONFIG, num_blocks=2, block_size=16)
    arrays = [array for pair in cache.layers for array in pair]
    for i, array in enumerate(arrays):
        array[...] = i
    assert [np.unique(array).tolist() for array in arrays] == [[i] for i in range(6)]


def test_copy_blocks_copies_in_every_layer():
    cache = KVCache(CONFIG, num_blocks=3, block_size=16)
    for i, pair in enumerate(cache.layers):
        pair[0][1], pair[1][1] = i + 1, -i - 1
    cache.copy_blocks(int32([[1, 2]]))
    for keys, values in cache.layers:
        assert_equal_bits(keys[2], keys[1])
        assert_equal_bits(values[2], values[1])
        assert not keys[0].any()


def test_a_large_cache_costs_only_what_is_used():
    cache = KVCache(CONFIG, num_blocks=10**6, block_size=16)  # 6 GB
    cache.layers[-1][1][-1] = 1
    assert cache.layers[-1][1][-1].all()


def test_the_memory_is_private():
    """Shared mappings get no huge pages where shmem_enabled is never, as it is by default."""
    cache = KVCache(CONFIG, num_blocks=1000)
    address = cache.layers[0][0].ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("not mapped")


def test_close_gives_the_pages_up():
    cache = KVCache(CONFIG, num_blocks=2)
    cache.close()
    assert cache.layers == []


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (-1, 16), (1, 0), (1, 24), (1, 8)])
def test_sizes_that_cannot_be(num_blocks, block_size):
    message = f"num_blocks >= 1 and block_size a positive multiple of 16, got {num_blocks} and"
    with pytest.raises(ValueError, match=message):
        KVCache(CONFIG, num_blocks=num_blocks, block_size=block_size)


def test_dtype_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"dtype must be one of .*bfloat16, int8, int4, got 'int2'"
    ):
        KVCache(CONFIG, num_blocks=1, dtype="int2")


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_quantised_layout(dtype):
    cache = KVCache(WIDE, num_blocks=5, block_size=32, dtype=dtype)
    rows = cache_row_bytes(dtype, 128)
    for pair in cache.layers:
        for pages, row in zip(pair, rows, strict=True):
            assert isinstance(pages, Quantized)
            assert (pages.dtype, pages.shape) == (dtype, (5, 2, 32, 128))
            assert pages.payload.shape == (5, 2, 32 * row)
            assert pages.payload.flags.c_contiguous
            assert pages.payload.flags.writeable
            pages.payload[...] += 1
    assert all((c.payload == 1).all() for pair in cache.layers for c in pair), "shared memory"
    assert cache.num_bytes == 3 * 5 * 2 * 32 * sum(rows)
    assert bytes_per_token(WIDE, dtype) == 3 * 2 * sum(rows)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_copy_blocks_copies_quantised_pages(dtype):
    cache = KVCache(WIDE, num_blocks=3, block_size=16, dtype=dtype)
    for i, pair in enumerate(cache.layers):
        pair[0].payload[1], pair[1].payload[1] = i + 1, i + 11
    cache.copy_blocks(int32([[1, 2]]))
    for i, (keys, values) in enumerate(cache.layers):
        assert (keys.payload[2] == i + 1).all()
        assert (values.payload[2] == i + 11).all()
        assert not keys.payload[0].any()


def test_heads_that_int4_cannot_hold():
    message = r"int4 cache must have head_dim a multiple of \d+, got 8; use kv_dtype='int8'"
    with pytest.raises(ValueError, match=message):
        KVCache(CONFIG, num_blocks=1, dtype="int4")
    with pytest.raises(ValueError, match=message):
        bytes_per_token(CONFIG, "int4")
    KVCache(CONFIG, num_blocks=1, dtype="int8")


def test_memory_that_the_system_refuses():
    with pytest.raises(RuntimeError, match=r"no memory for a KV cache of .* GB .*kv_memory"):
        KVCache(CONFIG, num_blocks=2**45)


def test_plan_is_what_the_sequences_can_use(free_memory):
    free_memory(10**12)
    assert plan(max_model_len=100) == 7 * 2
    assert plan(max_model_len=96, max_num_seqs=5) == 6 * 5
    assert plan() == 63 * 2  # max_position_embeddings


def test_plan_takes_a_share_of_what_the_weights_leave(free_memory):
    free_memory(10**6 + 100 * PAGE_BYTES)
    assert plan(weight_bytes=10**6) == 80


def test_plan_takes_all_of_kv_memory(free_memory):
    free_memory(0)
    assert plan(kv_memory=10 * PAGE_BYTES + 1) == 10
    assert plan(kv_memory="1MB", max_model_len=16) == 10**6 // PAGE_BYTES


def test_plan_that_does_not_hold_one_sequence(free_memory):
    free_memory(10 * PAGE_BYTES)
    message = r"KV cache of 1000 tokens takes .* in float16, and there are .*lower max_model_len"
    with pytest.raises(RuntimeError, match=message):
        plan(max_model_len=1000)
    with pytest.raises(RuntimeError, match=message):
        plan(max_model_len=1000, kv_memory=PAGE_BYTES)
    with pytest.raises(RuntimeError, match=r"there are 0\.00 GB"):
        plan(weight_bytes=10**9)


def test_plan_gives_one_long_sequence_more_than_its_share(free_memory):
    free_memory(100 * PAGE_BYTES)
    assert plan(max_model_len=80 * 16, max_num_seqs=1) == 80
    assert plan(max_model_len=90 * 16) == plan(max_model_len=90 * 16, max_num_seqs=1) == 90
    assert plan(max_model_len=95 * 16) == 95
    with pytest.raises(RuntimeError, match="lower max_model_len to 1520 or raise kv_memory"):
        plan(max_model_len=96 * 16)


def test_plan_says_what_would_fit(free_memory):
    sizes = {dtype: bytes_per_token(WIDE, dtype) * 16 for dtype in ("float16", *CACHE_DTYPES)}

    def refusal(num_bytes):
        with pytest.raises(RuntimeError) as caught:
            plan_num_blocks(
                WIDE, replace(ASKED, max_model_len=100 * 16, kv_memory=num_bytes), weight_bytes=0
            )
        return str(caught.value)

    gigabytes = {dtype: f"{100 * size / 1e9:.2f} GB" for dtype, size in sizes.items()}
    both = refusal(100 * sizes["int8"])
    assert f"1600 tokens takes {gigabytes['float16']} in float16" in both
    assert f"use kv_dtype='int8', which takes {gigabytes['int8']}" in both
    assert f"use kv_dtype='int4', which takes {gigabytes['int4']}" in both
    fewer = 100 * sizes["int8"] // sizes["float16"] * 16
    assert both.endswith(f", lower max_model_len to {fewer} or raise kv_memory")
    one = refusal(100 * sizes["int4"])
    assert "int8" not in one
    assert "use kv_dtype='int4'" in one
    neither = refusal(sizes["int4"] // 2)
    assert "kv_dtype" not in neither
    assert neither.endswith("for it; lower max_model_len or raise kv_memory")


@pytest.mark.parametrize(
    ("kv_memory", "error"),
    [(0, ValueError), (-5, ValueError), ("lots", ValueError), (1.5, TypeError)],
)
def test_kv_memory_that_is_no_size(kv_memory, error):
    with pytest.raises(error, match="memory size"):
        plan(kv_memory=kv_memory)
