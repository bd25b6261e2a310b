"""A row of attention depends on its own sequence alone, bit for bit.

Not on the batch, the chunk it is computed in, where its blocks lie, their size, the threads, or
whether its keys lie in blocks at all.
"""

import numpy as np
import pytest
from helpers.builders import ACTIVATION_AND_CACHED, int32, paged
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops.quantized import CACHE_DTYPES

DTYPES = pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("float16", "float16"),
     ("bfloat16", "bfloat16"), ("float32", "int8"), ("float32", "int4")],
)  # fmt: skip
HEADS = pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
LENGTHS = [1, 63, 64, 65, 200, 1023, 1025, 2100]


def rows_of(case, sequence, first, last, **arguments):
    """Queries [first, last) of one sequence, computed alone as a chunk that ends at `last`."""
    begin, end = case.cu_seqlens_q[sequence : sequence + 2]
    length = case.seq_lens[sequence] - (end - begin) + last
    return ops.paged_attention(
        np.ascontiguousarray(case.query[begin + first : begin + last]),
        case.key_cache, case.value_cache, case.block_tables[sequence : sequence + 1],
        int32([length]), int32([0, last - first]), **arguments,
    )  # fmt: skip


@DTYPES
@HEADS
@pytest.mark.usefixtures("isa")
def test_batch(rng, dtype, cache_dtype, heads):
    queries = [min(n, q) for n, q in zip(LENGTHS, [1, 1, 5, 3, 40, 1, 2, 7], strict=True)]
    case = paged(
        rng, LENGTHS, queries, heads=heads, head_dim=96, dtype=dtype, cache_dtype=cache_dtype
    )
    out, lse = ops.paged_attention(*case.arguments)
    for sequence, (begin, end) in enumerate(
        zip(case.cu_seqlens_q[:-1], case.cu_seqlens_q[1:], strict=True)
    ):
        alone = rows_of(case, sequence, 0, end - begin)
        assert_equal_bits(alone[0], out[begin:end])
        assert_equal_bits(alone[1], lse[begin:end])


@DTYPES
@HEADS
@pytest.mark.parametrize(("length", "head_dim"), [(300, 32), (300, 64), (300, 128), (1100, 32)])
@pytest.mark.usefixtures("isa")
def test_chunks(rng, dtype, cache_dtype, heads, length, head_dim):
    """The last 260 tokens at once, in chunks of every kind of size, and one by one.

    Keys of 128 elements are read in another way than others (with_spread_keys).
    """
    case = paged(
        rng, [length], [260], heads=heads, head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype
    )
    out, lse = ops.paged_attention(*case.arguments)
    for size in (2, 3, 4, 5, 12, 13, 16, 97, 129):
        for first in {0, 260 - size, int(rng.integers(260 - size))}:
            chunk = rows_of(case, 0, first, first + size)
            assert_equal_bits(chunk[0], out[first : first + size])
            assert_equal_bits(chunk[1], lse[first : first + size])
    for row in (0, 1, 127, 258, 259):
        assert_equal_bits(rows_of(case, 0, row, row + 1)[0], out[row : row + 1])


@pytest.mark.parametrize(("dtype", "cache_dtype"), ACTIVATION_AND_CACHED)
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.usefixtures("isa")
def test_pages_and_contiguous_keys(rng, dtype, cache_dtype, head_dim):
    """Other places, other sizes, no blocks at all (which only floats can do without)."""
    if cache_dtype == "int4":
        head_dim = head_dim // 32 * 32
    case = paged(
        rng, [1, 70, 1500, 130], [1, 5, 1, 130], heads=(6, 2), head_dim=head_dim, dtype=dtype,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    expected = ops.paged_attention(*case.arguments)
    others = [
        ops.paged_attention(*case.repaged(rng, block_size).arguments)
        for block_size in (16, 32, 48, 64, 128, 1536)
    ]
    if cache_dtype not in CACHE_DTYPES:
        others.append(ops.flash_attention(*case.contiguous))
    for out, lse in others:
        assert_equal_bits(out, expected[0])
        assert_equal_bits(lse, expected[1])


@DTYPES
@pytest.mark.parametrize("queries", [[1, 1, 1], [5, 2, 1], [130, 100, 2]])
@pytest.mark.usefixtures("isa")
def test_threads(rng, threads, dtype, cache_dtype, queries):
    case = paged(
        rng, [3100, 100, 2500], queries, heads=(8, 2), head_dim=32, dtype=dtype,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    threads(1)
    expected = ops.paged_attention(*case.arguments)
    for count in (2, 3, 7):
        threads(count)
        out, lse = ops.paged_attention(*case.arguments)
        assert_equal_bits(out, expected[0])
        assert_equal_bits(lse, expected[1])
