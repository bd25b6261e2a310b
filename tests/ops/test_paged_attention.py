"""paged_attention against the float64 oracle: dtypes, head ratios, lengths, unseen memory."""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_CACHED, ends, int32, normal, paged
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse

from codellama_rt import ops
from codellama_rt.ops import reference

pytestmark = pytest.mark.usefixtures("isa")
HEADS = [(2, 2), (6, 2), (8, 1)]  # 1, 3 and 8 query heads a key/value head
BLOCK_SIZE = 64
EDGES = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1]
RAGGED = [5, 1100, 17, 64, 300]
# (seq_lens, num_queries)
BATCHES = {
    **{f"decode-{n}": ([n], [1]) for n in EDGES},
    "prefill": (EDGES, EDGES),
    "decode-ragged": (RAGGED, [1] * 5),
    "speculation": (RAGGED, [5, 4, 2, 4, 3]),
    "chunks": (RAGGED, [5, 130, 9, 64, 100]),
    "mixed": ([700, 33, 2049, 1], [1, 33, 6, 1]),
}


def assert_oracle(case, **attributes):
    out, lse = ops.paged_attention(*case.arguments, **attributes)
    expected, expected_lse = reference.paged_attention(*case.arguments, **attributes)
    assert_attention(out, expected, case.key_cache.dtype)
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("float32", "int8"), ("float32", "int4")],
)
def test_lengths_and_head_ratios(rng, dtype, cache_dtype, batch, heads):
    assert_oracle(
        paged(
            rng, *BATCHES[batch], heads=heads, head_dim=32, block_size=BLOCK_SIZE, dtype=dtype,
            cache_dtype=cache_dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("head_dim", [2, 30, 32, 64, 80, 96, 128])
@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_CACHED)
def test_dtypes_and_head_sizes(rng, dtype, cache_dtype, head_dim, block_size):
    if cache_dtype == "int4" and head_dim % 32:
        pytest.skip("an int4 cache is refused here, as test_quantized_caches.py shows")
    assert_oracle(
        paged(
            rng, [70, 1, 40], [6, 1, 2], head_dim=head_dim, block_size=block_size, dtype=dtype,
            cache_dtype=cache_dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("cache_dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(rng, scale, cache_dtype):
    assert_oracle(paged(rng, [100, 30], [2, 30], cache_dtype=cache_dtype), scale=scale)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_out_is_written_and_returned(rng, guarded, dtype):
    case = paged(rng, [70, 9], [3, 9], dtype=dtype, cache_dtype=dtype)
    expected = ops.paged_attention(*case.arguments)
    out = guarded(case.query.shape, dtype), guarded(case.query.shape[:2])
    returned = ops.paged_attention(*case.arguments, out=out)
    assert returned[0] is out[0]
    assert returned[1] is out[1]
    assert_equal_bits(out[0], expected[0])
    assert_equal_bits(out[1], expected[1])


def test_scores_far_apart_and_large(rng):
    """Scores of thousands: without the subtracted maximum exp would overflow."""
    case = paged(rng, [300], [4])
    case.query *= 300
    case.key_cache[:, :, ::7] *= 3
    assert_oracle(case)


def test_equal_scores_give_the_mean(rng):
    case = paged(rng, [90], [1])
    case.query[...] = 0
    out, lse = ops.paged_attention(*case.arguments)
    assert_attention(out, case.value.astype(np.float64).mean(0).repeat(2, axis=0)[None])
    assert_lse(lse, np.full((1, 4), np.log(90)))


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_queries", [3, 40])
def test_later_tokens_are_not_seen_and_seen_ones_are(rng, bad, cache_dtype, num_queries):
    """A key or value that is not finite: rows before it keep their bits, rows after it show it."""
    case = paged(rng, [200], [num_queries], cache_dtype=cache_dtype)
    clean, _ = ops.paged_attention(*case.arguments)
    at = 200 - 2  # seen by the last two queries only
    for in_values in (False, True):
        key, value = case.key[at].copy(), case.value[at].copy()
        (value if in_values else key)[0, 5] = bad
        out, _ = ops.paged_attention(*case.with_token(at, key, value).arguments)
        assert_equal_bits(out[:-2], clean[:-2])
        assert_equal_bits(out[:, 2:], clean[:, 2:])  # heads of the other key/value head
        if np.isnan(bad) or in_values:
            assert not np.isfinite(out[-2:, :2]).all(axis=-1).any()


def test_sequences_without_queries_and_without_keys(rng):
    case = paged(rng, [30, 20, 0, 40], [1, 0, 0, 2])
    out, lse = ops.paged_attention(*case.arguments)
    expected, expected_lse = reference.paged_attention(*case.arguments)
    assert_attention(out, expected)
    assert_lse(lse, expected_lse)


@pytest.mark.parametrize(
    ("argument", "index", "value", "message"),
    [
        ("seq_lens", 1, 1, r"seq_lens\[1\]=1 must be at least its queries \(2\)"),
        ("seq_lens", 0, 81, r"seq_lens\[0\]=81 .* at most max_blocks \* block_size = 80"),
        ("seq_lens", 0, -1, r"seq_lens\[0\]=-1 must be at least"),
        ("block_tables", (0, 3), -1, r"block_tables\[0, 3\]=-1 must be in \[0, num_blocks=10\)"),
        ("block_tables", (1, 2), 10, r"block_tables\[1, 2\]=10 must be in \[0, num_blocks=10\)"),
        ("cu_seqlens_q", 0, 1, "cu_seqlens_q must rise from 0 to num_tokens=3"),
        ("cu_seqlens_q", 1, 4, "cu_seqlens_q must rise from 0 to num_tokens=3"),
        ("cu_seqlens_q", 2, 2, "cu_seqlens_q must rise from 0 to num_tokens=3"),
    ],
)
def test_values_out_of_range(rng, argument, index, value, message):
    case = paged(rng, [50, 40], [1, 2])
    getattr(case, argument)[index] = value
    out = np.zeros_like(case.query), np.zeros(case.query.shape[:2], np.float32)
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        ops.paged_attention(*case.arguments, out=out)
    assert not out[0].any()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_scale_that_cannot_be(rng, scale):
    case = paged(rng, [5], [1])
    with pytest.raises(ValueError, match="paged_attention: scale must be finite and not negative"):
        ops.paged_attention(*case.arguments, scale=scale)


def test_offsets_past_2_31(rng, huge_cache):
    """The last block of a cache of more than 2^31 elements, through both ops that address it."""
    num_blocks = huge_cache.shape[0]
    key = normal(rng, (20, 1, 128), "float16")
    table = int32([[num_blocks - 1, 0]])
    slots = int32([table[0, t // 16] * 16 + t % 16 for t in range(20)])
    ops.reshape_and_cache(key, key, huge_cache, huge_cache, slots)
    query = normal(rng, (1, 2, 128))
    arguments = (query, huge_cache, huge_cache, table, int32([20]), ends([1]))
    out, _ = ops.paged_attention(*arguments)
    assert_attention(out, reference.flash_attention(query, key, key, ends([1]), ends([20]))[0])
    ops.copy_blocks(huge_cache, huge_cache, int32([[num_blocks - 1, num_blocks - 2]]))
    table[0, 0] = num_blocks - 2
    assert_equal_bits(ops.paged_attention(*arguments)[0], out)
