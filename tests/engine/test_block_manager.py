"""What the block manager gives, shares, copies and evicts, case by case."""

import pytest

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.sequence import Sequence, int32_list


def sequence_of(tokens, salt=0):
    tokens = int32_list(tokens)
    return Sequence(tokens, len(tokens), (0, 0, 0), len(tokens) - 1, cache_salt=salt)


def compute_all(blocks, sequence):
    blocks.copied()
    sequence.num_computed = len(sequence.token_ids)
    blocks.index_blocks(sequence)


def cached_sequence(blocks, tokens, salt=0):
    sequence = sequence_of(tokens, salt)
    assert blocks.allocate(sequence)
    compute_all(blocks, sequence)
    return sequence


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_sizes_must_be_positive(num_blocks, block_size):
    with pytest.raises(ValueError, match="num_blocks and block_size must be >= 1"):
        BlockManager(num_blocks, block_size)


def test_one_sequence_may_use_all_blocks():
    blocks = BlockManager(4, 2)
    sequence = sequence_of(range(8))
    assert blocks.allocate(sequence)
    assert blocks.num_free == 0
    assert sorted(sequence.block_ids) == [0, 1, 2, 3]
    blocks.release(sequence)
    assert blocks.num_free == 4


def test_what_does_not_fit_changes_nothing():
    blocks = BlockManager(4, 2)
    cached_sequence(blocks, range(6))
    late = sequence_of([0, 1, 2, 3, 9, 9, 9, 9])
    assert not blocks.allocate(late)
    assert (blocks.num_free, len(late.block_ids), late.num_computed) == (1, 0, 0)
    assert [blocks.num_owners(i) for i in range(4)] == [1, 1, 1, 0]


def test_a_prefix_is_shared_but_a_token_is_left_to_compute():
    blocks = BlockManager(8, 2)
    first = cached_sequence(blocks, [5, 6, 7, 8])
    second = sequence_of([5, 6, 7, 8])
    assert blocks.allocate(second)
    assert second.num_computed == 3  # the last full block holds the last token
    assert second.block_ids[0] == first.block_ids[0]
    assert blocks.copies == {second.block_ids[1]: first.block_ids[1]}
    assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == (8, 3)
    assert blocks.num_partial_hit_tokens == 1


def test_wanted_prompt_logits_are_computed_even_on_a_hit():
    blocks = BlockManager(8, 2)
    cached_sequence(blocks, range(6))
    again = sequence_of(range(6))
    again.first_logit = 3
    assert blocks.allocate(again)
    assert again.num_computed == 3


def test_equal_blocks_computed_apart_become_one():
    blocks = BlockManager(8, 2)
    first, second = sequence_of([1, 2, 3]), sequence_of([1, 2, 3])
    assert blocks.allocate(first)
    assert blocks.allocate(second)
    assert first.block_ids[0] != second.block_ids[0]
    compute_all(blocks, first)
    compute_all(blocks, second)
    assert first.block_ids[0] == second.block_ids[0]
    assert blocks.num_free == 5


def test_a_hash_collision_gives_no_wrong_block():
    assert hash((-1,)) == hash((-2,))  # the names of these salts' empty prefixes, in CPython
    blocks = BlockManager(8, 2)
    cached_sequence(blocks, [1, 2, 3], salt=-1)
    other = sequence_of([1, 2, 3], salt=-2)
    assert blocks.allocate(other)
    assert other.num_computed == 0


def test_a_block_counts_only_behind_its_own_prefix():
    blocks = BlockManager(8, 2)
    cached_sequence(blocks, [1, 2, 3, 4, 9])
    other = sequence_of([3, 4, 3, 4, 9])
    assert blocks.allocate(other)
    assert other.num_computed == 0


def test_eviction_takes_the_least_recently_used_end_first():
    blocks = BlockManager(4, 2)
    old = cached_sequence(blocks, [1, 1, 1, 1])
    blocks.release(old)
    young = cached_sequence(blocks, [2, 2, 2, 2])
    blocks.release(young)
    assert blocks.num_free == 4
    assert blocks.allocate(sequence_of([3, 3]))  # evicts the second block of the old one
    probe = sequence_of([1, 1, 1, 1, 1])
    assert blocks._longest_cached_prefix(probe) == [0]
    assert blocks._longest_cached_prefix(sequence_of([2, 2, 2, 2, 2])) == [2, 3]


def test_the_longest_head_among_many_siblings_is_found():
    blocks = BlockManager(64, 8)
    for i in range(20):
        blocks.release(cached_sequence(blocks, [1, 2, *range(3, 3 + i % 5), 50 + i, 7, 7]))
    sequence = sequence_of([1, 2, 3, 4, 5, 58, 7, 9, 9, 9])
    assert blocks.allocate(sequence)
    assert sequence.num_computed == 7


def test_a_released_tail_is_found_by_what_it_holds():
    blocks = BlockManager(8, 4)
    first = cached_sequence(blocks, [1, 2, 3, 4, 5, 6])
    first.token_ids.extend([7, 8, 9])
    assert blocks.grow(first, 3)
    first.num_computed = 7  # of nine tokens
    blocks.index_blocks(first)
    tail = first.block_ids[1]
    blocks.release(first)
    second = sequence_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.allocate(second)
    assert second.num_computed == 7
    assert (second.block_ids[1], blocks.copies) == (tail, {})  # nobody else needs it


def test_a_tail_that_another_sequence_writes_on_is_copied():
    blocks = BlockManager(8, 4)
    first = cached_sequence(blocks, [1, 2, 3])
    second, third = sequence_of([1, 2, 3, 4, 5]), sequence_of([1, 2, 9])
    assert blocks.allocate(second)
    assert blocks.allocate(third)
    assert (second.num_computed, third.num_computed) == (3, 2)
    tail = first.block_ids[0]
    assert blocks.copies == {second.block_ids[0]: tail, third.block_ids[0]: tail}
    assert blocks.num_owners(tail) == 1
    blocks.release(first)
    assert blocks.num_free == 8 - 4  # the copies keep it
    blocks.copied()
    assert blocks.num_free == 8 - 3


def test_a_tail_that_has_been_filled_is_found_as_a_block():
    blocks = BlockManager(8, 2)
    first = cached_sequence(blocks, [1])
    first.token_ids.append(2)
    compute_all(blocks, first)
    second = cached_sequence(blocks, [1, 2, 3])
    assert second.block_ids[0] == first.block_ids[0]
    assert len(blocks._index) == 2


def test_a_filled_tail_gives_way_to_the_equal_block():
    blocks = BlockManager(8, 2)
    first, second = sequence_of([1, 2, 3]), sequence_of([1])
    assert blocks.allocate(first)
    assert blocks.allocate(second)
    compute_all(blocks, second)
    second.token_ids.append(2)
    compute_all(blocks, first)
    compute_all(blocks, second)
    assert second.block_ids[0] == first.block_ids[0]
    assert (blocks.num_free, len(blocks._idle)) == (6, 0)


def test_no_head_is_copied_where_its_source_is_the_last_free_block():
    blocks = BlockManager(2, 4)
    blocks.release(cached_sequence(blocks, [1, 2, 3]))
    sequence = sequence_of([1, 2, 4, 5, 6])
    assert blocks.allocate(sequence)
    assert (sequence.num_computed, blocks.copies, blocks.num_free) == (0, {}, 0)


def test_a_tail_that_has_yet_to_be_copied_cannot_be_found():
    blocks = BlockManager(8, 4)
    parent = cached_sequence(blocks, [1])
    parent.token_ids.append(2)
    compute_all(blocks, parent)
    child = parent.fork(1)
    blocks.fork(parent, child)
    parent.token_ids.append(3)
    assert blocks.grow(parent, 1)
    assert list(blocks.copies) == list(parent.block_ids)
    blocks.release(parent)
    assert blocks.copies == {}
    late = sequence_of([1, 2, 3])
    assert blocks.allocate(late)
    assert (late.num_computed, blocks.copies) == (1, {late.block_ids[0]: child.block_ids[0]})


def test_a_reset_drops_what_is_idle_and_hides_what_is_owned():
    blocks = BlockManager(8, 2)
    blocks.release(cached_sequence(blocks, [5, 5, 5]))
    running = cached_sequence(blocks, [1, 2, 3])
    blocks.reset_prefix_cache([running])
    assert (blocks.num_free, len(blocks._idle)) == (6, 0)
    assert len(running.block_ids) == 2
    running.token_ids.extend([4, 5])
    assert blocks.grow(running, 2)
    compute_all(blocks, running)
    for tokens in ([1, 2, 3, 4, 5], [5, 5, 5]):
        probe = sequence_of(tokens)
        assert blocks.allocate(probe)
        assert probe.num_computed == 0
        blocks.release(probe)
    blocks.release(running)
    assert (blocks.num_free, blocks._index) == (8, {})
    again = cached_sequence(blocks, [1, 2, 3])  # from now on it is cached again
    assert blocks._longest_cached_prefix(sequence_of([1, 2, 3])) == [again.block_ids[0]]


def test_without_prefix_caching_nothing_is_shared():
    blocks = BlockManager(8, 2, prefix_caching=False)
    cached_sequence(blocks, [1, 2, 3])
    again = sequence_of([1, 2, 3])
    assert blocks.allocate(again)
    assert again.num_computed == 0
    assert blocks.num_queried_tokens == 0


def test_a_fork_copies_its_last_block_before_it_writes():
    blocks = BlockManager(8, 2)
    parent = cached_sequence(blocks, [1, 2, 3])
    child = parent.fork(1)
    blocks.fork(parent, child)
    assert child.block_ids == parent.block_ids
    for sequence in (parent, child):
        sequence.token_ids.append(4)
        assert blocks.grow(sequence, 1)
    assert blocks.copies == {parent.block_ids[1]: child.block_ids[1]}  # the last writes in place
    assert parent.block_ids[0] == child.block_ids[0]


def test_growing_past_the_last_block_changes_nothing():
    blocks = BlockManager(2, 2)
    sequence = cached_sequence(blocks, [1, 2, 3, 4])
    sequence.token_ids.append(5)
    assert not blocks.grow(sequence, 1)
    assert (len(sequence.block_ids), blocks.copies) == (2, {})


def test_freeing_twice_is_caught():
    blocks = BlockManager(2, 2)
    sequence = cached_sequence(blocks, [1])
    stale = list(sequence.block_ids)
    blocks.release(sequence)
    sequence.block_ids.extend(stale)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.release(sequence)
