"""Attention on the device against the float64 oracle: the split kernel (up to 16 queries), the
unsplit ones (chunks), and what takes any other shape.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attention_cases import long_case, run
from device_arrays import get, put
from helpers.builders import normal, paged
from helpers.tolerances import assert_equal_bits, assert_lse

from codellama_rt.model.cuda import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import numpy_dtype

HEADS = [(2, 2), (6, 2), (8, 1)]  # 1, 3 and 8 query heads a key/value head
# (seq_lens, num_queries)
BATCHES = {
    "decode-edges": ([1, 63, 64, 65, 256, 257], [1] * 6),
    "decode-one": ([600], [1]),
    "speculation": ([5, 300, 17, 64], [5, 4, 2, 16]),
    "chunks": ([40, 300], [17, 130]),
    "mixed": ([270, 33, 1, 130], [1, 33, 1, 60]),
    "no-queries": ([70, 30, 20], [1, 0, 1]),
}
# Scores are dot products of rounded numbers, weights are rounded to 16 bits: of values of size 1,
# some units of 2^-9 (bfloat16) or 2^-12 (float16), less for being averaged.
ATOL = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-5}


def assert_oracle(case, **attributes):
    out, lse = run(case, **attributes)
    rounded = case.query.astype(case.key_cache.dtype)  # as the op takes it
    expected, expected_lse = reference.paged_attention(rounded, *case.arguments[1:], **attributes)
    error = np.abs(out.astype(np.float64) - expected).max(initial=0)
    assert error <= ATOL[case.key_cache.dtype.name] + ATOL[case.query.dtype.name] / 4, error
    assert_lse(lse, expected_lse)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), ("float16", 128), ("float16", 64)]
)
def test_lengths_and_head_ratios(rng, dtype, head_dim, batch, heads):
    assert_oracle(
        paged(
            rng, *BATCHES[batch], heads=heads, head_dim=head_dim, block_size=64, dtype=dtype,
            cache_dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64)])
def test_page_sizes(rng, dtype, head_dim, block_size):
    assert_oracle(
        paged(
            rng, [300, 70, 40], [1, 3, 20], head_dim=head_dim, block_size=block_size, dtype=dtype,
            cache_dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_dim"),
    [("float32", "float32", 128), ("float32", "bfloat16", 8), ("bfloat16", "bfloat16", 80),
     ("bfloat16", "float16", 128), ("float16", "float32", 30)],
)  # fmt: skip
def test_other_shapes(rng, dtype, cache_dtype, head_dim):
    case = paged(
        rng, [70, 1, 40], [6, 1, 20], head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype
    )
    out, lse = run(case)
    expected, expected_lse = reference.paged_attention(
        case.query.astype(np.float32), *case.arguments[1:4], *case.arguments[4:]
    )
    if cache_dtype == "bfloat16":  # the oracle rounds the query then, this kernel does not
        expected, expected_lse = reference.paged_attention(
            case.query, *(c.astype(np.float32) for c in case.arguments[1:3]), *case.arguments[3:]
        )
    assert np.abs(out.astype(np.float64) - expected).max() <= ATOL[dtype]
    assert_lse(lse, expected_lse)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
def test_long_sequences_fold_nodes(rng, heads):
    """More than one node of splits: two levels of folding, by both kernels."""
    case = paged(
        rng, [4096 + 300], [1], heads=heads, head_dim=128, block_size=64, dtype="bfloat16",
        cache_dtype="bfloat16",
    )  # fmt: skip
    assert_oracle(case)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("heads", [(1, 1), (4, 1)])
def test_131072_tokens(rng, heads):
    """512 splits, 32 nodes."""
    case = paged(
        rng, [131_072], [1], heads=heads, head_dim=128, block_size=128, dtype="bfloat16",
        cache_dtype="bfloat16",
    )  # fmt: skip
    assert_oracle(case)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), ("float16", 128), ("float16", 64), ("float32", 40)]
)
def test_flash_attention(rng, dtype, head_dim, causal):
    case = paged(
        rng, [5, 300, 70], [5, 20, 1], heads=(4, 2), head_dim=head_dim, dtype=dtype,
        cache_dtype=dtype,
    )  # fmt: skip
    got, lse = get(*ops.flash_attention(*put(*case.contiguous), causal=causal))
    expected, expected_lse = reference.flash_attention(*case.contiguous, causal=causal)
    assert np.abs(got.astype(np.float64) - expected).max() <= ATOL[dtype] * 1.25
    assert_lse(lse, expected_lse)


# --- Bits ---------------------------------------------------------------------------------


def one_query(case, query):
    """The same sequence up to that query, as a decoding step."""
    length = int(case.seq_lens[0]) - len(case.query) + query + 1
    return (
        case.query[query : query + 1], *case.arguments[1:4], np.array([length], np.int32),
        np.array([0, 1], np.int32),
    )  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("queries", [9, 70])
def test_a_row_does_not_depend_on_its_chunk(rng, queries):
    case = long_case(rng, queries)
    out, lse = run(case)
    for query in (0, queries // 2, queries - 1):
        alone, its_lse = get(*ops.paged_attention(*put(*one_query(case, query))))
        assert_equal_bits(alone[0], out[query])
        assert_equal_bits(its_lse[0], lse[query])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("queries", [1, 20])
def test_a_row_does_not_depend_on_pages_or_batch(rng, queries):
    case = long_case(rng, queries)
    out, lse = run(case)
    for block_size in (16, 128):
        for got, expected in zip(run(case.repaged(rng, block_size)), (out, lse), strict=True):
            assert_equal_bits(got, expected)
    others = paged(
        rng, [90, 700, 400], [1, 1, 30], heads=(4, 2), head_dim=128, dtype="bfloat16",
        cache_dtype="bfloat16",
    )  # fmt: skip
    joined = join(others, case)
    both, both_lse = get(*ops.paged_attention(*put(*joined)))
    assert_equal_bits(both[-queries:], out)
    assert_equal_bits(both_lse[-queries:], lse)


def join(first, second):
    """Two batches in one, in one pair of caches of pages of 16."""
    rng = np.random.default_rng(1)
    second = second.repaged(rng, 16)
    blocks = len(first.key_cache)
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    tables = [np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in
              (first.block_tables, second.block_tables + blocks)]  # fmt: skip
    return (
        np.concatenate([first.query, second.query]),
        np.concatenate([first.key_cache, second.key_cache]),
        np.concatenate([first.value_cache, second.value_cache]),
        np.concatenate(tables).astype(np.int32),
        np.concatenate([first.seq_lens, second.seq_lens]),
        np.concatenate([first.cu_seqlens_q, first.cu_seqlens_q[-1] + second.cu_seqlens_q[1:]]),
    )


@pytest.mark.parametrize("num_bytes", [0, (1 << 20) + 20_000])
@pytest.mark.parametrize("seq_len", [700, 4096 + 200])
def test_bits_without_or_with_little_workspace(rng, emulated, num_bytes, seq_len):
    """The unsplit kernel does what cannot be split: the same sums."""
    case = long_case(rng, 1, seq_len)
    out, lse = run(case)
    memory = ops.empty((num_bytes + 1,), "uint8")
    emulated.set_workspace(memory.device_ptr if num_bytes else 0, num_bytes)
    for got, expected in zip(run(case), (out, lse), strict=True):
        assert_equal_bits(got, expected)


AMPERE = {"CODELLAMA_RT_EMULATED_CAPABILITY": "80"}
JIT = {"CUDA_FORCE_PTX_JIT": "1"}  # the driver passes over machine code, and compiles sm_80's PTX
COPIES = {"CODELLAMA_RT_CUDA_COPIES": "cp.async"}


def run_elsewhere(module, path, variables):
    """Attention in a process of its own, where the emulator reads its environment."""
    child = Path(__file__).with_name("attention_of_capability.py")
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(child), module.__file__, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_copies_by_cp_async_give_the_same_bits(emulated_module, tmp_path):
    """What runs on Ampere, and on a Hopper that tests ask for it: other copies into the tiles."""
    results = []
    for i, variables in enumerate(({}, AMPERE, {**JIT, **COPIES})):
        path = tmp_path / f"{i}.npz"
        result = run_elsewhere(emulated_module, path, variables)
        assert result.returncode == 0, result.stderr
        results.append(np.load(path))
    assert len(results[0].files) == 4
    for other in results[1:]:
        for name in results[0].files:
            assert_equal_bits(other[name], results[0][name])


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"CODELLAMA_RT_EMULATED_IMAGE": "80"}, "the driver loaded kernels of sm_80, which this"),
     (JIT, "unset CUDA_FORCE_PTX_JIT, or build the library for sm_90a"),
     (COPIES, "CODELLAMA_RT_CUDA_COPIES=cp.async needs CUDA_FORCE_PTX_JIT=1"),
     ({"CODELLAMA_RT_CUDA_COPIES": "tma"}, "must be cp.async or not set, got tma")],
)  # fmt: skip
def test_kernels_of_another_image_are_refused(emulated_module, tmp_path, variables, message):
    """An image whose kernels use other copies than the host asks for would do nothing."""
    path = tmp_path / "out.npz"
    result = run_elsewhere(emulated_module, path, variables)
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr
    assert message in result.stderr
    assert not path.exists()


def test_numpy_dtype_is_what_the_cases_use():
    assert normal(np.random.default_rng(0), (1,), "bfloat16").dtype == numpy_dtype("bfloat16")
