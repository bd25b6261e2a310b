"""MindSpore tensors -> glue -> CANN's C symbols -> host tiling -> emulated kernels."""

import numpy as np
import pytest
from helpers.builders import int32, normal, paged, rope_tables
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse, assert_rounded

from codellama_rt.model.ascend import ops as ascend
from codellama_rt.ops import reference

pytestmark = pytest.mark.usefixtures("device")
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def tensor(array):
    import mindspore

    return mindspore.Tensor.from_numpy(array)


def array(result, like):
    """MindSpore has a NumPy bfloat16 of its own."""
    return np.array(result.asnumpy()).view(like.dtype)


@DTYPES
def test_norms(rng, dtype):
    x, residual = (normal(rng, (9, 300), dtype) for _ in range(2))
    weight = normal(rng, 300, dtype)
    out = ascend.rms_norm(tensor(x), tensor(weight), 1e-6)
    assert_rounded(array(out, x), reference.rms_norm(x, weight, 1e-6))
    out, total = ascend.add_rms_norm(tensor(x), tensor(residual), tensor(weight))
    expected, expected_total = reference.add_rms_norm(x, residual, weight)
    assert_rounded(array(out, x), expected)
    assert_equal_bits(array(total, x), expected_total.astype(x.dtype))


@DTYPES
def test_silu_and_mul(rng, dtype):
    gate_up = normal(rng, (3, 2 * 176), dtype)
    out = ascend.silu_and_mul(tensor(gate_up))
    assert_rounded(array(out, gate_up), reference.silu_and_mul(gate_up))


@DTYPES
def test_caches_are_written_in_place(rng, dtype):
    head_dim, heads = 64, (8, 2)
    qkv = normal(rng, (4, (8 + 2 * 2) * head_dim), dtype)
    tables, positions = rope_tables(50, head_dim), int32([3, 49, 0, 7])
    caches = [normal(rng, (2, heads[1], 128, head_dim), dtype) for _ in range(2)]
    expected_caches = [cache.copy() for cache in caches]
    slots = int32([200, -1, 5, 127])
    pages = [tensor(cache) for cache in caches]
    query = ascend.rope_and_cache(
        tensor(qkv), *map(tensor, tables), tensor(positions), *pages, tensor(slots)
    )
    expected = reference.rope_and_cache(qkv, *tables, positions, *expected_caches, slots)
    assert_rounded(array(query, qkv), expected)
    key, value = (normal(rng, (2, 2, head_dim), dtype) for _ in range(2))
    slots = int32([130, 6])
    ascend.reshape_and_cache(tensor(key), tensor(value), *pages, tensor(slots))
    reference.reshape_and_cache(key, value, *expected_caches, slots)
    for page, cache, wanted in zip(pages, caches, expected_caches, strict=True):
        assert_rounded(array(page, qkv), wanted)
        assert_rounded(cache, wanted)  # the caller's own memory


@DTYPES
@pytest.mark.parametrize("as_given", [list, np.asarray, tensor], ids=["list", "numpy", "tensor"])
def test_paged_attention(rng, as_given, dtype):
    case = paged(rng, [70, 1500, 5], [3, 1, 1], heads=(4, 2), block_size=128, dtype=dtype,
                 cache_dtype=dtype)  # fmt: skip
    query, keys, values, tables, lens, ends = case.arguments
    out, lse = ascend.paged_attention(
        *map(tensor, (query, keys, values, tables)), as_given(lens), as_given(ends)
    )
    expected, expected_lse = reference.paged_attention(*case.arguments)
    assert_attention(array(out, query), expected)
    assert_lse(lse.asnumpy(), expected_lse)


def test_a_view_of_whole_rows_is_read_where_it_lies(rng):
    x, weight = normal(rng, (9, 64), "float16"), normal(rng, 64, "float16")
    out = ascend.rms_norm(tensor(x)[3:7], tensor(weight))
    assert_rounded(array(out, x), reference.rms_norm(x[3:7], weight))


def test_ops_run_in_their_order(rng):
    """MindSpore's kernels between ours, many times, nothing read in between."""
    import mindspore

    matmul = mindspore.ops.MatMul(transpose_b=True)
    weight, norm = normal(rng, (128, 128), "float16", 0.1), np.ones(128, np.float16)
    x = y = normal(rng, (5, 128), "float16")
    x = tensor(x)
    for _ in range(20):
        x = matmul(ascend.rms_norm(x, tensor(norm)), tensor(weight))
        y = reference.rms_norm(y, norm).astype(np.float16).astype(np.float64) @ weight.T.astype(
            float
        )
        y = y.astype(np.float16)
    assert np.abs(x.asnumpy() - y).max() <= 0.02 * np.abs(y).max()


def test_an_error_of_the_kernel_is_shown_when_a_result_is_read(rng):
    case = paged(rng, [200], [1], heads=(2, 2), block_size=128, dtype="float16",
                 cache_dtype="float16")  # fmt: skip
    case.block_tables[0, 1] = 1000
    out, _ = ascend.paged_attention(*map(tensor, case.arguments[:4]), *case.arguments[4:])
    with pytest.raises(
        RuntimeError, match=r"507000: ClrtPagedAttention: core 0: .*outside the ten"
    ):
        out.asnumpy()


X, W = np.zeros((2, 64), np.float16), np.zeros(64, np.float16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ascend.rms_norm(tensor(X), tensor(W[:32].copy())), ValueError,
         r"rms_norm: weight must be \(dim\), got \(32,\); dim is 64 elsewhere"),
        (lambda: ascend.rms_norm(tensor(W), tensor(W)), ValueError,
         r"rms_norm: x must be \(num_tokens, dim\), got \(64,\)"),
        (lambda: ascend.rms_norm(tensor(X.astype(np.float32)), tensor(W)), TypeError,
         "rms_norm: x must be float16 or bfloat16 on Ascend, got float32; cast"),
        (lambda: ascend.rms_norm(tensor(X), tensor(W.astype(np.float32))), TypeError,
         "rms_norm: weight must be float16 on Ascend, got float32"),
        (lambda: ascend.silu_and_mul(tensor(X).T), ValueError,
         r"silu_and_mul: gate_up must be contiguous, it is a view; use .contiguous\(\)"),
        (lambda: ascend.rms_norm([1], tensor(W)), TypeError,
         "rms_norm: x must be a mindspore.Tensor, got list"),
        (lambda: ascend.silu_and_mul(tensor(X[:, :63].copy())), ValueError,
         r"silu_and_mul: gate_up must be \(num_tokens, 2 \* hidden_dim\), got \(2, 63\)"),
        (lambda: ascend.rope_and_cache(*[None] * 7, interleaved=True), ValueError,
         "rotate halves, not interleaved pairs"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("lens", "ends", "message"),
    [
        ([0], [0, 1], r"seq_lens\[0\]=0 must be at least its queries \(1\) and at most .* = 256"),
        ([257], [0, 1], r"seq_lens\[0\]=257 must be at least"),
        ([9], [0, 2], "cu_seqlens_q must rise from 0 to num_tokens=1"),
        ([9], [1, 1], "cu_seqlens_q must rise"),
        ([9], [0, 1, 1], "cu_seqlens_q must rise"),
    ],
)
def test_lengths_that_cannot_be(lens, ends, message):
    query, cache = np.zeros((1, 2, 16), np.float16), np.zeros((3, 2, 128, 16), np.float16)
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        ascend.paged_attention(
            tensor(query), tensor(cache), tensor(cache), tensor(np.zeros((1, 2), np.int32)), lens,
            ends,
        )  # fmt: skip


def test_a_page_size_that_cannot_be():
    key, cache = np.zeros((1, 2, 16), np.float16), np.zeros((3, 2, 24, 16), np.float16)
    with pytest.raises(ValueError, match="block_size % 16 == 0 must hold, with block_size=24"):
        ascend.reshape_and_cache(
            tensor(key), tensor(key), tensor(cache), tensor(cache), tensor(int32([0]))
        )
