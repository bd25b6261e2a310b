"""Sequences with the same blocks at the head of their tables: attended together, the bits of each.

The pass over shared blocks (csrc/cpu/attention/plan.h) takes whole splits of 1024 keys, of
sequences whose rows fit one task; the tables here share that much, a little less, and nothing.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from helpers.builders import GARBAGE_BLOCKS, ends, int32, normal, unwritten_caches
from helpers.tolerances import assert_attention, assert_equal_bits, assert_lse

from codellama_rt import ops
from codellama_rt.ops import reference

CACHES = pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"),
     ("float32", "int8"), ("float32", "int4")],
)  # fmt: skip


@dataclass(frozen=True)
class Sequence:
    """`like` names an earlier sequence whose blocks begin this one's table, `common` keys of it."""

    num_keys: int
    num_queries: int = 1
    like: int | None = None
    common: int = 0


@dataclass
class Family:
    """Arguments of paged_attention for sequences that share blocks; unused memory is NaN."""

    query: np.ndarray
    caches: list
    tables: np.ndarray
    lens: np.ndarray
    cu: np.ndarray

    @property
    def arguments(self):
        return self.query, *self.caches, self.tables, self.lens, self.cu

    def alone(self, i):
        """Attention of one sequence by itself."""
        begin, end = self.cu[i : i + 2]
        return ops.paged_attention(
            np.ascontiguousarray(self.query[begin:end]), *self.caches, self.tables[i : i + 1],
            self.lens[i : i + 1], int32([0, end - begin]),
        )  # fmt: skip


def tables_of(rng, sequences, block_size, spare=3):
    """Shuffled blocks for all; returns the tables and how many blocks there are."""
    counts = [-(-s.num_keys // block_size) for s in sequences]
    shared = [s.common // block_size if s.like is not None else 0 for s in sequences]
    num_blocks = sum(counts) - sum(shared) + spare
    free = iter(rng.permutation(num_blocks))
    tables = int32(rng.choice(GARBAGE_BLOCKS, (len(sequences), max(counts) + 1)))
    for table, sequence, count, same in zip(tables, sequences, counts, shared, strict=True):
        if same:
            table[:same] = tables[sequence.like, :same]
        table[same:count] = [next(free) for _ in range(count - same)]
    return tables, num_blocks


def family(
    rng, sequences, *, heads=(4, 2), head_dim=32, block_size=64, dtype="float32",
    cache_dtype="float32", make_caches=unwritten_caches,
) -> Family:  # fmt: skip
    tables, num_blocks = tables_of(rng, sequences, block_size)
    lens = int32([s.num_keys for s in sequences])
    caches = make_caches((num_blocks, heads[1], block_size, head_dim), cache_dtype)
    slots = []
    for table, length in zip(tables, lens, strict=True):
        tokens = np.arange(length)
        slots.append(table[tokens // block_size] * block_size + tokens % block_size)
    slots = np.unique(np.concatenate(slots))
    rows = normal(rng, (2, len(slots), heads[1], head_dim))
    ops.reshape_and_cache(*rows, *caches, int32(slots))
    cu = ends([s.num_queries for s in sequences])
    query = normal(rng, (int(cu[-1]), heads[0], head_dim), dtype)
    return Family(query, caches, tables, lens, cu)


def assert_each_alone(case: Family) -> None:
    out, lse = ops.paged_attention(*case.arguments)
    for i, (begin, end) in enumerate(zip(case.cu[:-1], case.cu[1:], strict=True)):
        expected = case.alone(i)
        assert_equal_bits(out[begin:end], expected[0])
        assert_equal_bits(lse[begin:end], expected[1])


def assert_oracle(case: Family) -> None:
    out, lse = ops.paged_attention(*case.arguments)
    expected, expected_lse = reference.paged_attention(*case.arguments)
    assert_attention(out, expected, case.caches[0].dtype)
    assert_lse(lse, expected_lse)


def children(lengths, common, num_queries=1, like=0):
    return [Sequence(n, num_queries, like, common) for n in lengths]


FAMILIES = {
    "samples": [Sequence(2100), *children([2100] * 7, 2048)],
    "two": [Sequence(1200), *children([1090], 1024)],
    "tails": [Sequence(1025), *children([1088, 2500, 1024 + 1, 4200], 1024)],
    "nothing whole": [Sequence(1500), *children([1500, 1023], 960)],
    "equal tables": [Sequence(2048), *children([2048, 2048, 2047], 2048)],
    "verification": [Sequence(2200, 5), *children([2100, 2150, 2300], 2048, num_queries=5)],
    "one of several queries": [Sequence(2200, 3), *children([2100, 2300], 2048)],
    "queries inside what is shared": [Sequence(2048, 9), *children([2060, 2048], 2048)],
    "a chunk that fits": [Sequence(1100, 12), *children([1100, 1124], 1024)],
    "a chunk that does not": [Sequence(1300, 150), *children([1100, 1124], 1024)],
    "no queries": [Sequence(1200, 0), *children([1100, 1124], 1024)],
    "strangers": [Sequence(1200), Sequence(2100), *children([1100], 1024), Sequence(30),
                  *children([2100, 3000], 2048, like=1)],
    "heads in heads": [Sequence(3300), *children([3300, 3200], 3072), *children([2100, 4200], 1024),
                       Sequence(4300, 1, 4, 4096), Sequence(1030, 2, 0, 1024)],
    "more rows than a task has": [Sequence(1100), *children(range(1050, 1150), 1024)],
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@CACHES
@pytest.mark.usefixtures("isa")
def test_families(rng, name, dtype, cache_dtype):
    assert_each_alone(
        family(rng, FAMILIES[name], heads=(9, 3), dtype=dtype, cache_dtype=cache_dtype)
    )


@pytest.mark.parametrize("name", ["samples", "verification", "heads in heads"])
@pytest.mark.parametrize("heads", [(32, 32), (64, 8)])
@CACHES
@pytest.mark.usefixtures("isa")
def test_heads(rng, name, heads, dtype, cache_dtype):
    assert_each_alone(
        family(rng, FAMILIES[name], heads=heads, dtype=dtype, cache_dtype=cache_dtype)
    )


@pytest.mark.parametrize("name", ["samples", "tails", "heads in heads", "verification"])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32", d) for d in ("float32", "int8")])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.usefixtures("isa")
def test_families_against_the_oracle(rng, name, dtype, cache_dtype, head_dim):
    assert_oracle(
        family(rng, FAMILIES[name], head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype)
    )


@pytest.mark.parametrize("block_size", [16, 48, 128, 1024, 1536])
@CACHES
@pytest.mark.usefixtures("isa")
def test_block_sizes(rng, block_size, dtype, cache_dtype):
    """48 and 1536 do not divide a split: it ends inside a block, which must be the same too."""
    common = -(-2048 // block_size) * block_size
    sequences = [
        Sequence(2 * common + 9),
        *children([common + 9, common + 90, 2 * common], common),
        *children([common + 70], common - block_size),
    ]
    assert_each_alone(
        family(rng, sequences, block_size=block_size, dtype=dtype, cache_dtype=cache_dtype)
    )


@pytest.mark.parametrize("head_dim", [96, 128])
@CACHES
@pytest.mark.usefixtures("isa")
def test_numbers_of_sequences(rng, head_dim, dtype, cache_dtype):
    sequences = FAMILIES["samples"]
    for count in (2, 3, 5, 8):
        assert_each_alone(
            family(rng, sequences[:count], head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype)
        )


@CACHES
@pytest.mark.parametrize("heads", [(4, 4), (16, 2)])
def test_threads(rng, threads, heads, dtype, cache_dtype):
    """Other numbers of threads cut the pass at other splits, or not at all."""
    sequences = [Sequence(9000), *children([7800, 8200, 9100, 7200], 7168), Sequence(3000)]
    case = family(rng, sequences, heads=heads, dtype=dtype, cache_dtype=cache_dtype)
    for count in (1, 2, 3, 7, 64):
        threads(count)
        assert_each_alone(case)


def random_sequences(rng):
    """A random forest: most sequences go on from a random length of an earlier one."""
    sequences = []
    for i in range(int(rng.integers(2, 12))):
        num_queries = int(rng.choice([0, 1, 1, 1, 1, 2, 5, 13, 40, 100]))
        own = int(rng.choice([1, 30, 64, 1000, 1500])) + num_queries
        like, common = (int(rng.integers(i)), 0) if i and rng.random() < 0.8 else (None, 0)
        if like is not None:
            most = sequences[like].num_keys
            common = int(rng.choice([most, 1024, 2048, rng.integers(most + 1)]))
            common = min(common, most)
        # May end inside what is shared: some queries then see less than their neighbours' whole.
        num_keys = max(1, num_queries, common + own - int(rng.choice([0, 0, num_queries, 700])))
        sequences.append(Sequence(num_keys, num_queries, like, min(common, num_keys)))
    order = rng.permutation(len(sequences))  # where a member stands in the batch tells nothing
    return sequences, order


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("isa")
def test_random_tables(seed, threads):
    rng = np.random.default_rng(seed)
    sequences, order = random_sequences(rng)
    heads = [(4, 4), (8, 1), (6, 2)][rng.integers(3)]
    cache_dtype = str(rng.choice(["float32", "bfloat16", "float16", "int8", "int4"]))
    block_size = int(rng.choice([16, 32, 48, 64, 128]))
    case = family(rng, sequences, heads=heads, block_size=block_size, cache_dtype=cache_dtype)
    counts = np.diff(case.cu)[order]
    rows = [np.arange(*case.cu[i : i + 2]) for i in order]
    case = Family(
        case.query[np.concatenate(rows)], case.caches, case.tables[order], case.lens[order],
        ends(counts),
    )  # fmt: skip
    threads(int(rng.choice([1, 2, 3, 5])))
    assert_each_alone(case)


def side_by_side(shape, dtype):
    """Caches with keys and values token by token in one pool (strided views)."""
    num_blocks, n_kv_heads, block_size, head_dim = shape
    pool = np.full((num_blocks, 2, block_size, n_kv_heads, head_dim), np.nan, dtype)
    return [pool[:, 0].swapaxes(1, 2), pool[:, 1].swapaxes(1, 2)]


@pytest.mark.parametrize("cache_dtype", ["float32", "float16"])
@pytest.mark.usefixtures("isa")
def test_strided_caches(rng, cache_dtype):
    assert_each_alone(
        family(rng, FAMILIES["heads in heads"], cache_dtype=cache_dtype, make_caches=side_by_side)
    )


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.usefixtures("isa")
def test_what_a_row_does_not_see_does_not_reach_it(rng, cache_dtype):
    """NaN in one sequence's own blocks stays there; NaN in what is shared reaches all."""
    case = family(rng, FAMILIES["samples"], cache_dtype=cache_dtype)
    before, _ = ops.paged_attention(*case.arguments)
    bad = np.full((1, 2, 32), np.nan, np.float32)

    def spoil(sequence, token):
        slot = case.tables[sequence, token // 64] * 64 + token % 64
        ops.reshape_and_cache(bad, bad, *case.caches, int32([slot]))
        return ops.paged_attention(*case.arguments)[0]

    out = spoil(3, 2099)
    assert_equal_bits(np.delete(out, 3, axis=0), np.delete(before, 3, axis=0))
    assert np.isnan(out[3]).any()
    out = spoil(0, 100)
    assert np.isnan(out).any(axis=(1, 2)).all()
