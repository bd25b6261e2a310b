"""apply_rotary_pos_emb: both pairings, odd halves, far positions, in place."""

import numpy as np
import pytest
from helpers.builders import int32, normal, rope_tables
from helpers.tolerances import assert_equal_bits, assert_rounded

from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.dtypes import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("isa")
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True])


@PAIRINGS
@pytest.mark.parametrize("head_dim", [2, 16, 30, 64, 80, 128])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_against_the_oracle(rng, dtype, heads, head_dim, interleaved):
    query, key = (normal(rng, (7, n, head_dim), dtype) for n in heads)
    tables, positions = rope_tables(100, head_dim), int32(rng.integers(0, 100, 7))
    expected = [reference.rotate(x, *tables, positions, interleaved) for x in (query, key)]
    returned = ops.apply_rotary_pos_emb(query, key, *tables, positions, interleaved=interleaved)
    assert returned[0] is query
    assert returned[1] is key
    assert_rounded(query, expected[0])
    assert_rounded(key, expected[1])


@PAIRINGS
def test_position_100_000(rng, interleaved):
    query, key = normal(rng, (3, 2, 64)), normal(rng, (3, 1, 64))
    tables, positions = rope_tables(100_001, 64), int32([100_000, 0, 99_999])
    expected = reference.rotate(query, *tables, positions, interleaved)
    ops.apply_rotary_pos_emb(query, key, *tables, positions, interleaved=interleaved)
    assert_rounded(query, expected)


@PAIRINGS
def test_position_zero_changes_nothing(rng, interleaved):
    query, key = normal(rng, (2, 3, 40)), normal(rng, (2, 1, 40))
    before = query.copy()
    tables = rope_tables(1, 40)
    ops.apply_rotary_pos_emb(query, key, *tables, int32([0, 0]), interleaved=interleaved)
    assert_equal_bits(query, before)


def test_pairings_are_permutations_of_each_other(rng):
    query, key = normal(rng, (5, 2, 64)), normal(rng, (5, 2, 64))
    tables, positions = rope_tables(50, 64), int32(rng.integers(0, 50, 5))
    order = np.arange(64).reshape(2, 32).T.ravel()  # 0, 32, 1, 33, ...
    shuffled = [np.ascontiguousarray(x[..., order]) for x in (query, key)]
    ops.apply_rotary_pos_emb(query, key, *tables, positions)
    ops.apply_rotary_pos_emb(*shuffled, *tables, positions, interleaved=True)
    assert_rounded(shuffled[0], query[..., order])


def test_nan_stays_in_its_pair(rng):
    query, key = normal(rng, (2, 1, 40)), normal(rng, (2, 1, 40))
    query[1, 0, 3] = np.nan
    ops.apply_rotary_pos_emb(query, key, *rope_tables(9, 40), int32([4, 8]))
    assert np.argwhere(np.isnan(query)).tolist() == [[1, 0, 3], [1, 0, 23]]


@pytest.mark.parametrize("bad", [-1, 9])
def test_position_outside_the_table(rng, bad):
    query, key = normal(rng, (2, 1, 4)), normal(rng, (2, 1, 4))
    before = query.copy()
    message = rf"positions\[1\] must be in \[0, num_positions=9\), got {bad}"
    with pytest.raises(ValueError, match=f"apply_rotary_pos_emb: {message}"):
        ops.apply_rotary_pos_emb(query, key, *rope_tables(9, 4), int32([0, bad]))
    assert_equal_bits(query, before)
