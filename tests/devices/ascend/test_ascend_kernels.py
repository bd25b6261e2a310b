"""The Ascend kernels under the emulator against the float64 oracle: everything but attention."""

import numpy as np
import pytest
from aclnn import AclnnError
from helpers.builders import int32, normal, rope_tables
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt.ops import reference

HEADS = [(32, 32), (40, 40), (64, 8)]
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
POSITIONS = [0, 1, 17, 4095, 16_384, 65_535, 99_999]
BLOCK_SIZE, NUM_BLOCKS = 128, 3


def slots_of(rng, num_tokens):
    """Distinct slots anywhere, every third token without one."""
    slots = int32(rng.permutation(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens])
    slots[2::3] = -1
    return slots


def caches_of(n_kv_heads, head_dim, dtype):
    shape = (NUM_BLOCKS, n_kv_heads, BLOCK_SIZE, head_dim)
    return [np.full(shape, np.nan).astype(normal(np.random.default_rng(0), 1, dtype).dtype)
            for _ in range(2)]  # fmt: skip


def check_rope_and_cache(aclnn, rng, positions, heads, head_dim, dtype):
    n_heads, n_kv_heads = heads
    num_tokens = len(positions)
    qkv = normal(rng, (num_tokens, (n_heads + 2 * n_kv_heads) * head_dim), dtype)
    used, positions = np.unique(positions, return_inverse=True)  # only the rows that are read
    tables = rope_rows(used, head_dim)
    caches = caches_of(n_kv_heads, head_dim, dtype)
    expected_caches = [cache.copy() for cache in caches]
    arguments = (qkv, *tables, int32(positions))
    slots = slots_of(rng, num_tokens)
    query = aclnn.rope_and_cache(*arguments, *caches, slots)
    expected = reference.rope_and_cache(*arguments, *expected_caches, slots)
    assert_rounded(query, expected)
    assert_rounded(caches[0], expected_caches[0])
    assert_equal_bits(caches[1], expected_caches[1])


def rope_rows(positions, head_dim, theta=1e6):
    angles = np.asarray(positions)[:, None] * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_rope_and_cache(aclnn, rng, heads, head_dim, num_tokens, dtype):
    positions = rng.choice(POSITIONS, num_tokens)
    check_rope_and_cache(aclnn, rng, positions, heads, head_dim, dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 48, 80, 256])
@pytest.mark.parametrize("heads", [(3, 1), (8, 2)])
def test_rope_and_cache_of_other_head_sizes(aclnn, rng, heads, head_dim, dtype):
    check_rope_and_cache(aclnn, rng, POSITIONS, heads, head_dim, dtype)


@pytest.mark.parametrize("cores", [1, 20, 24, 48])
def test_rope_and_cache_on_any_number_of_cores(aclnn, rng, cores):
    aclnn.set_cores(cores)
    check_rope_and_cache(aclnn, rng, POSITIONS, (40, 40), 128, "bfloat16")


def test_no_slot(aclnn, rng):
    caches = caches_of(2, 64, "float16")
    aclnn.rope_and_cache(normal(rng, (2, 8 * 64), "float16"), *rope_tables(2, 64), int32([0, 1]),
                         *caches, int32([-1, -1]))  # fmt: skip
    assert np.isnan(caches).all()


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_reshape_and_cache(aclnn, rng, head_dim, heads, num_tokens, dtype):
    key, value = (normal(rng, (num_tokens, heads[1], head_dim), dtype) for _ in range(2))
    caches = caches_of(heads[1], head_dim, dtype)
    expected = [cache.copy() for cache in caches]
    slots = slots_of(rng, num_tokens)
    aclnn.reshape_and_cache(key, value, *caches, slots)
    reference.reshape_and_cache(key, value, *expected, slots)
    assert_equal_bits(caches, expected)


DIMS = [1, 33, 64, 100, 2048, 4096, 5120, 8192]  # 7B, 13B and 70B: the last three


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 3, 41])
@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm(aclnn, rng, dim, num_tokens, dtype):
    x, weight = normal(rng, (num_tokens, dim), dtype, 3), normal(rng, dim, dtype)
    assert_rounded(aclnn.rms_norm(x, weight), reference.rms_norm(x, weight))


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 3, 41])
@pytest.mark.parametrize("dim", DIMS)
def test_add_rms_norm(aclnn, rng, dim, num_tokens, dtype):
    x, residual = (normal(rng, (num_tokens, dim), dtype, scale) for scale in (1, 3))
    weight = normal(rng, dim, dtype)
    out, total = aclnn.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert_equal_bits(total, expected_total.astype(x.dtype))
    assert_rounded(out, expected)


def test_add_rms_norm_in_place(aclnn, rng):
    """Each row is read before it is written: results may take their arguments' place."""
    x, residual = (normal(rng, (50, 100), "float16") for _ in range(2))
    weight = normal(rng, 100, "float16")
    expected = aclnn.add_rms_norm(x, residual, weight)
    aclnn.call("ClrtAddRmsNorm", x, residual, weight, 1e-5, x, residual)
    assert_equal_bits(x, expected[0])
    assert_equal_bits(residual, expected[1])


def test_rms_norm_of_a_row_that_does_not_fit_is_refused(aclnn, rng):
    x = normal(rng, (1, 16_384), "float16")
    with pytest.raises(AclnnError, match="561002: ClrtRmsNorm: the tiling function refuses"):
        aclnn.rms_norm(x, x[0])


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 5, 42])
@pytest.mark.parametrize("hidden_dim", [1, 7, 176, 4097, 11_008, 13_824, 28_672])
def test_silu_and_mul(aclnn, rng, hidden_dim, num_tokens, dtype):
    num_tokens = min(num_tokens, 200_000 // hidden_dim)
    gate_up = normal(rng, (num_tokens, 2 * hidden_dim), dtype, 4)
    assert_rounded(aclnn.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@DTYPES
def test_silu_of_large_numbers(aclnn, dtype):
    gate_up = np.array([[-6e4, -100.0, 0.0, 100.0, 6e4, 1, 1, 1, 1, 1]], np.float32)
    gate_up = gate_up.astype(normal(np.random.default_rng(0), 1, dtype).dtype)
    assert_rounded(aclnn.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_arguments_of_no_defined_dtype_are_refused(aclnn, rng, bad):
    x = [normal(rng, shape, "float16") for shape in ((2, 64), (2, 64), (64,))]
    x[bad] = x[bad].astype(np.float32)
    with pytest.raises(AclnnError, match="161002: ClrtAddRmsNorm: no defined combination"):
        aclnn.call("ClrtAddRmsNorm", *x, 1e-5, np.empty_like(x[0]), np.empty_like(x[0]))


def test_a_result_of_another_shape_is_refused(aclnn, rng):
    x = normal(rng, (2, 64), "float16")
    with pytest.raises(AclnnError, match="out has not the shape that is inferred"):
        aclnn.call("ClrtSiluAndMul", x, np.empty_like(x))
