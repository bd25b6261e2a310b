"""The ops beside attention and linear, on the device, against the float64 oracle."""

import numpy as np
import pytest
from device_arrays import get, poisoned, put
from helpers.builders import ACTIVATION_AND_STORED, int32, normal, rope_tables
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt.model.cuda import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.mark.parametrize(("table_dtype", "out_dtype"), ACTIVATION_AND_STORED)
@pytest.mark.parametrize("dim", [3, 512])
def test_embedding(rng, table_dtype, out_dtype, dim):
    ids, table = int32([4, 0, 4, 9]), normal(rng, (10, dim), table_dtype)
    out = ops.embedding(*put(ids, table), out=poisoned((4, dim), out_dtype))
    assert_rounded(get(out), reference.embedding(ids, table))


@pytest.mark.parametrize(("dtype", "weight_dtype"), ACTIVATION_AND_STORED)
@pytest.mark.parametrize("dim", [1, 100, 4096])
def test_rms_norm(rng, dtype, weight_dtype, dim):
    x, weight = normal(rng, (3, dim), dtype), normal(rng, (dim,), weight_dtype)
    out = ops.rms_norm(*put(x, weight), 1e-5, out=poisoned(x.shape, dtype))
    assert_rounded(get(out), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dim", [100, 4096])
def test_add_rms_norm_in_place(rng, dtype, dim):
    x, residual = normal(rng, (3, dim), dtype), normal(rng, (3, dim), dtype)
    weight = normal(rng, (dim,), dtype)
    expected = reference.add_rms_norm(x, residual, weight)
    on_device = put(x, residual)
    out, total = get(*ops.add_rms_norm(*on_device, put(weight), out=tuple(on_device)))
    assert_rounded(out, expected[0])
    assert_equal_bits(total, expected[1].astype(total.dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden", [5, 2048, 2056])
def test_silu_and_mul(rng, dtype, hidden):
    gate_up = normal(rng, (3, 2 * hidden), dtype, scale=4)
    gate_up[0, :2] = [-100, 100]
    out = ops.silu_and_mul(put(gate_up), out=poisoned((3, hidden), dtype))
    assert_rounded(get(out), reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 144])
def test_apply_rotary_pos_emb(rng, dtype, interleaved, head_dim):
    query, key = normal(rng, (5, 3, head_dim), dtype), normal(rng, (5, 2, head_dim), dtype)
    tables, positions = rope_tables(100_000, head_dim), int32([0, 7, 99_999, 3, 3])
    rotated = ops.apply_rotary_pos_emb(
        *put(query, key, *tables, positions), interleaved=interleaved
    )
    for got, x in zip(get(*rotated), (query, key), strict=True):
        assert_rounded(got, reference.rotate(x, *tables, positions, interleaved))


@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_STORED)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 144])
def test_rope_and_cache(rng, dtype, cache_dtype, interleaved, head_dim):
    tables, positions = rope_tables(64, head_dim), int32([0, 63, 5, 9])
    caches = [normal(rng, (3, 2, 16, head_dim), cache_dtype) for _ in range(2)]
    qkv, slots = normal(rng, (4, 7 * head_dim), dtype), int32([17, -1, 0, 47])
    on_device = put(qkv, *tables, positions, *caches, slots)
    query = ops.rope_and_cache(
        *on_device, interleaved=interleaved, out=poisoned((4, 3, head_dim), dtype)
    )
    expected = reference.rope_and_cache(
        qkv, *tables, positions, *caches, slots, interleaved=interleaved
    )
    assert_rounded(get(query), expected)
    key_cache, value_cache = get(*on_device[4:6])
    assert_rounded(key_cache, caches[0].astype(np.float64))
    assert_equal_bits(value_cache, caches[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "heads"), [(64, (3, 2)), (128, (6, 1)), (144, (2, 2))])
def test_rope_and_cache_of_many_tokens_to_131072(rng, head_dim, heads, interleaved):
    """Several heads a warp; the last positions of the longest context."""
    count, longest, (n_heads, n_kv_heads) = 133, 131_072, heads
    tables = rope_tables(longest, head_dim)
    positions = np.sort(rng.choice(longest, count, replace=False)).astype(np.int32)
    positions[-1] = longest - 1
    pages = (3, n_kv_heads, 64, head_dim)
    there = [poisoned(pages, "bfloat16") for _ in range(2)]
    caches = get(*there)
    qkv = normal(rng, (count, (n_heads + 2 * n_kv_heads) * head_dim), "bfloat16")
    slots = rng.permutation(3 * 64)[:count].astype(np.int32)
    slots[5] = -1
    query = ops.rope_and_cache(
        *put(qkv, *tables, positions), *there, put(slots), interleaved=interleaved,
        out=poisoned((count, n_heads, head_dim), "bfloat16"),
    )  # fmt: skip
    expected = reference.rope_and_cache(
        qkv, *tables, positions, *caches, slots, interleaved=interleaved
    )
    assert_rounded(get(query), expected)
    key_cache, value_cache = get(*there)
    assert_rounded(key_cache, caches[0].astype(np.float64))
    assert_equal_bits(value_cache, caches[1])


@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_STORED)
def test_reshape_and_cache(rng, dtype, cache_dtype):
    caches = [normal(rng, (3, 2, 16, 40), cache_dtype) for _ in range(2)]
    key, value = normal(rng, (4, 2, 40), dtype), normal(rng, (4, 2, 40), dtype)
    slots, on_device = int32([17, -1, 0, 47]), put(*caches)
    ops.reshape_and_cache(*put(key, value), *on_device, put(slots))
    reference.reshape_and_cache(key, value, *caches, slots)
    for got, expected in zip(get(*on_device), caches, strict=True):
        assert_equal_bits(got, expected)


def test_copy_blocks_in_order(rng):
    caches = [normal(rng, (6, 2, 16, 24), "float16") for _ in range(2)]
    pairs, on_device = int32([[0, 3], [3, 1], [5, 0], [2, 2]]), put(*caches)
    ops.copy_blocks(*on_device, put(pairs))
    reference.copy_blocks(*caches, pairs)
    for got, expected in zip(get(*on_device), caches, strict=True):
        assert_equal_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_merge_attention(rng, dtype):
    parts = [normal(rng, (4, 3, 72), dtype) for _ in range(2)]
    lses = [3 * normal(rng, (4, 3)) for _ in range(2)]
    lses[0][0, 0] = lses[1][0, 0] = lses[0][1, 1] = lses[1][2, 2] = -np.inf
    parts[0][1, 1] = parts[1][2, 2] = np.nan  # not read where there are no keys
    parts[0][0, 0] = parts[1][0, 0] = 0
    arguments = parts[0], lses[0], parts[1], lses[1]
    out = poisoned((4, 3, 72), dtype), poisoned((4, 3), "float32")
    merged, lse = get(*ops.merge_attention(*put(*arguments), out=out))
    clean = [np.nan_to_num(part.astype(np.float32)) for part in parts]
    expected, expected_lse = reference.merge_attention(clean[0], lses[0], clean[1], lses[1])
    assert_rounded(merged, expected)
    assert_rounded(lse, expected_lse)


def test_nothing_to_do(rng):
    none = put(np.zeros((0, 64), np.float32))
    assert ops.rms_norm(none, put(normal(rng, (64,)))).shape == (0, 64)


def test_host_arrays_are_refused(rng):
    x = normal(rng, (2, 64))
    with pytest.raises(TypeError, match=r"an op on cuda takes DeviceTensors, got numpy\.ndarray"):
        ops.rms_norm(x, x[0], out=x)


def test_shapes_are_checked(rng):
    x, weight = put(normal(rng, (2, 64)), normal(rng, (63,)))
    with pytest.raises(ValueError, match="rms_norm: weight must be"):
        ops.rms_norm(x, weight)


def test_a_head_that_no_warp_takes(rng):
    x, table = put(normal(rng, (1, 1, 20)), normal(rng, (4, 10)))
    with pytest.raises(
        ValueError, match="head_dim must be a multiple of 8 up to 128, or of 16 up to 256, got 20"
    ):
        ops.apply_rotary_pos_emb(x, x, table, table, put(int32([0])))
