"""How the ops are divided over cores: everything once, evenly, within the unified buffer."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tilings import UB_BYTES, UNIT_OVERHEAD, Plans

EXAMPLES = settings(
    max_examples=2000, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
CORES = st.sampled_from([20, 24, 40, 48])
HEADS = st.sampled_from([(32, 32), (40, 40), (64, 8), (8, 1), (4, 4), (1, 1), (71, 1), (128, 128)])
HEAD_DIMS = st.sampled_from([16, 48, 64, 80, 128, 256])
TOKENS = st.integers(0, 600)


@pytest.fixture(scope="module")
def plans(library):
    return Plans(library.library)


def assert_even(tasks, num_tasks, cores):
    """Contiguous shares of all tasks whose sizes differ by one at most; none past the cores."""
    first = np.array(tasks)
    assert first[0] == 0
    assert (first[cores:] == num_tasks).all()
    sizes = np.diff(first[: cores + 1])
    assert sizes.min() >= 0
    assert sizes.max() - sizes.min() <= 1


def chunks(total, chunk):
    """The pieces of `total` that tasks of `chunk` have."""
    return [range(begin, min(begin + chunk, total)) for begin in range(0, total, chunk)]


def assert_uses_all_cores(num_tokens, chunk, tasks, cores):
    """Where chunks could be smaller still, every core has a task."""
    assert chunk == 1 or num_tokens == 0 or tasks >= cores


@EXAMPLES
@given(num_tokens=TOKENS, heads=HEADS, head_dim=HEAD_DIMS, cores=CORES)
def test_rope_and_cache(plans, num_tokens, heads, head_dim, cores):
    n_heads, n_kv_heads = heads
    tiling, ub_bytes = plans.rope_and_cache(num_tokens, *heads, head_dim, 128, cores)
    assert 0 < ub_bytes <= UB_BYTES
    parts = chunks(n_heads, tiling.chunk_heads), chunks(n_kv_heads, tiling.chunk_heads)
    for total, pieces in zip(heads, parts, strict=True):
        assert [head for piece in pieces for head in piece] == list(range(total))
    tasks = num_tokens * (len(parts[0]) + 2 * len(parts[1]))
    assert_even(tiling.tasks, tasks, cores)
    assert_uses_all_cores(num_tokens, tiling.chunk_heads, tasks, cores)


@EXAMPLES
@given(num_tokens=TOKENS, n_kv_heads=st.integers(1, 128), head_dim=HEAD_DIMS, cores=CORES)
def test_reshape_and_cache(plans, num_tokens, n_kv_heads, head_dim, cores):
    tiling, ub_bytes = plans.reshape_and_cache(num_tokens, n_kv_heads, head_dim, 128, cores)
    assert 0 < ub_bytes <= UB_BYTES
    pieces = chunks(n_kv_heads, tiling.chunk_heads)
    assert_even(tiling.tasks, num_tokens * 2 * len(pieces), cores)
    assert_uses_all_cores(num_tokens, tiling.chunk_heads, num_tokens * 2 * len(pieces), cores)


@EXAMPLES
@given(
    num_tokens=TOKENS, dim=st.one_of(st.integers(1, 16384), st.sampled_from([4096, 5120, 8192])),
    has_residual=st.booleans(), cores=CORES,
)  # fmt: skip
def test_rms_norm(plans, num_tokens, dim, has_residual, cores):
    planned = plans.rms_norm(num_tokens, dim, int(has_residual), cores)
    if dim <= 10_864:
        assert planned is not None
    assume(planned is not None)
    tiling, ub_bytes = planned
    assert 0 < ub_bytes <= UB_BYTES
    assert_even(tiling.tasks, num_tokens, cores)


@EXAMPLES
@given(num_tokens=TOKENS, hidden_dim=st.integers(1, 30_000), cores=CORES)
def test_silu_and_mul(plans, num_tokens, hidden_dim, cores):
    tiling, ub_bytes = plans.silu_and_mul(num_tokens, hidden_dim, cores)
    assert 0 < ub_bytes <= UB_BYTES
    assert tiling.chunk % 64 == 0
    assert_even(tiling.tasks, num_tokens * len(chunks(hidden_dim, tiling.chunk)), cores)


@st.composite
def batches(draw):
    """Sequences: lengths, and how many of their last tokens have queries."""
    lens = draw(
        st.lists(
            st.one_of(st.integers(0, 300), st.integers(0, 100_000), st.just(1024)),
            min_size=1, max_size=8,
        )
    )  # fmt: skip
    return lens, [draw(st.integers(0, min(length, 5))) for length in lens]


@EXAMPLES
@given(batch=batches(), heads=HEADS, head_dim=HEAD_DIMS, cores=CORES,
       block_size=st.sampled_from([16, 48, 64, 128]))  # fmt: skip
def test_paged_attention(plans, batch, heads, head_dim, cores, block_size):
    lens, queries = batch
    planned = plans.paged_attention(lens, queries, heads, head_dim, block_size, cores)
    if heads[0] // heads[1] <= 8:
        assert planned is not None
    assume(planned is not None)
    tiling, ub_bytes = planned
    assert 0 < ub_bytes <= UB_BYTES
    rows = Rows(lens, queries, heads[1], tiling.split)
    begins = rows.check_boundaries(tiling, cores)
    rows.check_balance(begins, cores)
    rows.check_slots(tiling, cores)


class Rows:
    """Every row of a batch, its splits, and the units' weights, as the kernel defines them."""

    def __init__(self, lens, queries, n_kv_heads, split):
        seen = [range(n - q + 1, n + 1) for n, q in zip(lens, queries, strict=True)]
        keys = np.array([k for lengths in seen for k in lengths], np.int64).repeat(n_kv_heads)
        self.num_splits = np.maximum(1, -(-keys // split))
        self.offsets = np.concatenate([[0], np.cumsum(self.num_splits)])  # of a row's first unit
        weights = np.full(self.offsets[-1], split + UNIT_OVERHEAD, np.int64)
        ends = self.offsets[1:] - 1
        weights[ends] = keys - (self.num_splits - 1) * split + UNIT_OVERHEAD
        self.weights = weights
        self.sequences = np.arange(len(lens)).repeat(np.array(queries) * n_kv_heads)

    def check_boundaries(self, tiling, cores):
        """The cores' runs of units are all of them, in order, each once."""
        units = tiling.first[: cores + 1]
        for unit in units:
            at_end = unit.row == len(self.num_splits) and unit.split == 0
            assert at_end or 0 <= unit.split < self.num_splits[unit.row]
            assert at_end or unit.sequence == self.sequences[unit.row]
        begins = np.array([self.offsets[unit.row] + unit.split for unit in units])
        assert begins[0] == 0
        assert begins[-1] == self.offsets[-1]
        assert (np.diff(begins) >= 0).all()
        return begins

    def check_balance(self, begins, cores):
        """No core has more than its share and one unit."""
        before = np.concatenate([[0], np.cumsum(self.weights)])
        loads = np.diff(before[begins])
        assert loads.max(initial=0) <= before[-1] / cores + self.weights.max(initial=0) + 1

    def check_slots(self, tiling, cores):
        """Each unit of a shared row has a slot of its own, found by its core and by the merging."""
        owners = {}  # shared row -> its first slot
        for core in range(cores):
            begin, end = tiling.first[core], tiling.first[core + 1]
            if begin.split > 0:
                assert tiling.inherited_slot[core] == owners[begin.row] + begin.split
            opens = end.split > 0 and end.row not in owners
            assert (tiling.open_slot[core] >= 0) == opens
            if opens:
                assert (begin.row, begin.split) <= (end.row, 0)
                owners[end.row] = tiling.open_slot[core]
        taken = sorted((slot, self.num_splits[row]) for row, slot in owners.items())
        expected = 0
        for slot, count in taken:
            assert slot == expected
            expected += count
        assert tiling.num_slots == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ([10], [1], (4, 4), 24, 128, 40),  # rows of 48 bytes
        ([10], [1], (4, 3), 64, 128, 40),
        ([10], [1], (4, 4), 64, 24, 40),
        ([10], [11], (4, 4), 64, 128, 40),
        ([10], [1], (4, 4), 64, 128, 65),
        ([10], [1], (512, 1), 128, 128, 40),  # a group that the unified buffer cannot hold
    ],
)
def test_what_the_attention_kernel_does_not_take_is_refused(plans, arguments):
    assert plans.paged_attention(*arguments) is None
