"""Flash decoding on emulated vector cores: the oracle, 100,000 tokens, and the same bits always."""

from dataclasses import replace

import numpy as np
import pytest
from aclnn import AclnnError
from helpers.builders import ends, int32, normal, paged
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse

from codellama_rt.ops import reference

HEADS = [(32, 32), (40, 40), (64, 8)]
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
BLOCK_SIZE = 128
RAGGED = [5, 300, 17, 128, 64]
# (seq_lens, num_queries)
BATCHES = {
    **{f"decode-{n}": ([n], [1]) for n in (1, 63, 64, 65, 127, 128, 129)},
    "decode-ragged": (RAGGED, [1] * 5),
    "speculation": (RAGGED, [5, 4, 2, 4, 3]),
    "prefill": ([1, 64, 30], [1, 20, 30]),
    "nothing": ([30, 20, 0, 40], [1, 0, 0, 2]),
}


def make(rng, lens, queries, heads, dtype, head_dim=128, block_size=BLOCK_SIZE):
    return paged(
        rng, lens, queries, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
        cache_dtype=dtype,
    )  # fmt: skip


def assert_oracle(aclnn, case, **attributes):
    out, lse = aclnn.paged_attention(*case.arguments, **attributes)
    expected, expected_lse = reference.paged_attention(*case.arguments, **attributes)
    assert_attention(out, expected)
    assert_lse(lse, expected_lse)
    return out, lse


@DTYPES
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(aclnn, rng, batch, heads, dtype):
    assert_oracle(aclnn, make(rng, *BATCHES[batch], heads, dtype))


@DTYPES
@pytest.mark.parametrize("heads", HEADS)
def test_several_splits(aclnn, rng, heads, dtype):
    """Past 1,024 keys; rows that one core finishes and rows that cores share."""
    assert_oracle(aclnn, make(rng, [1500, 40], [1, 2], heads, dtype, head_dim=64))


@DTYPES
@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 256])
def test_head_and_page_sizes(aclnn, rng, head_dim, block_size, dtype):
    case = make(rng, [1100, 1, 140], [2, 1, 3], (6, 2), dtype, head_dim, block_size)
    assert_oracle(aclnn, case)


@DTYPES
@pytest.mark.parametrize(
    ("length", "heads"), [(1025, (2, 2)), (16_384, (2, 1)), (65_537, (1, 1)), (99_999, (2, 1)),
                          (100_000, (1, 1))],
)  # fmt: skip
def test_long_sequences(aclnn, rng, length, heads, dtype):
    assert_oracle(aclnn, make(rng, [length], [1], heads, dtype))


def test_a_long_and_short_sequences(aclnn, rng):
    assert_oracle(aclnn, make(rng, [3, 30_000, 700], [1, 2, 1], (2, 2), "float16", 64))


@DTYPES
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(aclnn, rng, scale, dtype):
    assert_oracle(aclnn, make(rng, [200, 30], [2, 30], (4, 2), dtype), scale=scale)


def test_scores_far_apart_and_large(aclnn, rng):
    case = make(rng, [1300], [4], (4, 2), "bfloat16")
    case.query *= 300
    assert_oracle(aclnn, case)


@pytest.mark.parametrize("cores", [1, 7, 20, 24, 48, 64])
def test_bits_do_not_depend_on_the_number_of_cores(aclnn, rng, cores):
    case = make(rng, [5000, 33], [2, 1], (4, 2), "float16", 64)
    expected = aclnn.paged_attention(*case.arguments)
    aclnn.set_cores(cores)
    for actual, wanted in zip(aclnn.paged_attention(*case.arguments), expected, strict=True):
        assert_equal_bits(actual, wanted)


def test_bits_do_not_depend_on_the_batch_or_the_chunk(aclnn, rng):
    case = make(rng, [2100, 70, 1030], [9, 1, 3], (4, 2), "bfloat16", 64)
    together = aclnn.paged_attention(*case.arguments)
    for s, (begin, end) in enumerate(zip(case.cu_seqlens_q, case.cu_seqlens_q[1:], strict=False)):
        for token in range(begin, end):
            alone = replace(
                case, query=case.query[token : token + 1], cu_seqlens_q=ends([1]),
                block_tables=case.block_tables[s : s + 1],
                seq_lens=int32([case.seq_lens[s] - (end - token) + 1]),
            )  # fmt: skip
            for actual, wanted in zip(
                aclnn.paged_attention(*alone.arguments), together, strict=True
            ):
                assert_equal_bits(actual[0], wanted[token])


def test_bits_do_not_depend_on_where_pages_lie(aclnn, rng):
    case = make(rng, [1500, 200], [1, 2], (4, 4), "float16", 64)
    expected = aclnn.paged_attention(*case.arguments)
    moved = case.repaged(rng, BLOCK_SIZE)
    for actual, wanted in zip(aclnn.paged_attention(*moved.arguments), expected, strict=True):
        assert_equal_bits(actual, wanted)


def test_later_tokens_are_not_seen(aclnn, rng):
    case = make(rng, [200], [3], (4, 2), "float16")
    clean, _ = aclnn.paged_attention(*case.arguments)
    for cache in (case.key_cache, case.value_cache):
        cache[case.block_tables[0, 1], 0, 199 - 128] = np.nan  # the last token, seen by the last
    dirty, _ = aclnn.paged_attention(*case.arguments)
    assert_equal_bits(dirty[:-1], clean[:-1])
    assert_equal_bits(dirty[:, 2:], clean[:, 2:])
    assert np.isnan(dirty[-1, :2]).all()


def test_a_page_that_does_not_exist_is_told(aclnn, rng):
    case = make(rng, [200], [1], (2, 2), "float16")
    case.block_tables[0, 1] = len(case.key_cache)
    with pytest.raises(AclnnError, match="reads global memory outside the tensors of the launch"):
        aclnn.paged_attention(*case.arguments)


def test_lengths_that_cannot_be_are_refused(aclnn, rng):
    case = make(rng, [50], [1], (2, 2), "float16")
    for length in (0, 3 * BLOCK_SIZE + 1):
        case.seq_lens[0] = length
        with pytest.raises(AclnnError, match="561002: ClrtPagedAttention: the tiling function"):
            aclnn.paged_attention(*case.arguments)


def test_what_a_head_sees_is_its_own(aclnn, rng):
    """Each query head attends to its own key/value head: one-hot values tell which."""
    case = make(rng, [40], [1], (8, 4), "float16", 16)
    case.value_cache[...] = np.arange(4, dtype=np.float16)[None, :, None, None]
    out, _ = aclnn.paged_attention(*case.arguments)
    np.testing.assert_allclose(out[0], np.arange(4).repeat(2)[:, None] * np.ones(16), atol=1e-2)


def test_equal_scores_give_the_mean(aclnn, rng):
    case = make(rng, [90], [1], (4, 2), "bfloat16")
    case.query[...] = normal(rng, 1, "bfloat16") * 0
    out, lse = aclnn.paged_attention(*case.arguments)
    assert_attention(out, case.value.astype(np.float64).mean(0).repeat(2, axis=0)[None])
    assert_lse(lse, np.full((1, 4), np.log(90)))
