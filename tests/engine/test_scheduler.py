"""Which tokens are computed when, without a model."""

import pytest

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Sequence, int32_list


def scheduler_of(num_blocks=64, block_size=4, max_num_seqs=8, tokens=32, prefix_caching=False):
    blocks = BlockManager(num_blocks, block_size, prefix_caching)
    return Scheduler(blocks, max_num_seqs, tokens)


def add(scheduler, length, arrival, priority=0, first=0):
    tokens = int32_list(range(first, first + length))
    sequence = Sequence(tokens, length, (priority, arrival, 0), length - 1)
    scheduler.add(sequence)
    return sequence


def commit(scheduler, chunk):
    """As the engine does when a chunk's keys and values are in the cache."""
    sequence = chunk.sequence
    sequence.num_computed = chunk.stop
    sequence.first_logit = max(sequence.first_logit, chunk.stop)
    scheduler.blocks.index_blocks(sequence)


def run(scheduler):
    """One step: commits every chunk; a sequence that is computed gets token 0."""
    chunks = scheduler.schedule()
    scheduler.blocks.copied()
    for chunk in chunks:
        commit(scheduler, chunk)
        if chunk.samples:
            chunk.sequence.token_ids.append(0)
    return chunks


def spans(chunks):
    return [(chunk.sequence.order[1], chunk.start, chunk.stop) for chunk in chunks]


@pytest.mark.parametrize("sizes", [(0, 32), (8, 0)])
def test_limits_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be >= 1"):
        Scheduler(BlockManager(4, 4), *sizes)


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    scheduler = scheduler_of()
    add(scheduler, 70, 0)
    steps = [run(scheduler) for _ in range(4)]
    assert [spans(s) for s in steps] == [
        [(0, 0, 32)],
        [(0, 32, 64)],
        [(0, 64, 70)],
        [(0, 70, 71)],
    ]
    assert [chunks[0].num_logits for chunks in steps] == [0, 0, 1, 1]


def test_decodes_go_before_prompts_and_prompts_in_order_of_arrival():
    scheduler = scheduler_of()
    add(scheduler, 4, 0)
    run(scheduler)
    for arrival in (1, 2, 3):
        add(scheduler, 20, arrival)
    assert spans(run(scheduler)) == [(0, 4, 5), (1, 0, 20), (2, 0, 11)]
    assert spans(run(scheduler)) == [(0, 5, 6), (1, 20, 21), (2, 11, 20), (3, 0, 20)]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = scheduler_of(num_blocks=256)
    add(scheduler, 500, 0)
    run(scheduler)
    add(scheduler, 3, 1)
    assert spans(run(scheduler)) == [(1, 0, 3), (0, 32, 61)]


def test_an_urgent_prompt_does_not_wait_for_a_long_one():
    scheduler = scheduler_of(num_blocks=512)
    add(scheduler, 500, 0)
    run(scheduler)
    add(scheduler, 900, 1, priority=-1)
    assert spans(run(scheduler)) == [(1, 0, 28), (0, 32, 36)]  # an eighth stays for the oldest


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
@pytest.mark.parametrize("num_blocks", [32, 512])
def test_no_prompt_starves_behind_short_ones(max_num_seqs, num_blocks):
    """Two long prompts and, in each step, as many new short ones as take the whole budget."""
    scheduler = scheduler_of(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    long = [add(scheduler, 120, arrival) for arrival in range(2)]
    for step in range(1, 400):
        for i in range(3):
            add(scheduler, 16, 3 * step + i)
        for chunk in run(scheduler):
            if len(chunk.sequence.token_ids) > chunk.sequence.prompt_len:
                scheduler.remove(chunk.sequence)
        if all(sequence.num_generated for sequence in long):
            break
    assert step <= 90  # the oldest has at least 4 of the 32 tokens in each step it runs in


def test_no_running_sequence_waits_for_prompts():
    scheduler = scheduler_of(num_blocks=512, max_num_seqs=32)
    add(scheduler, 4, 0)
    run(scheduler)
    for arrival in range(1, 28):
        add(scheduler, 10 + arrival, arrival, priority=-arrival)
        assert (0, 3 + arrival, 4 + arrival) in spans(run(scheduler))


def test_priority_goes_before_arrival():
    scheduler = scheduler_of(max_num_seqs=1)
    add(scheduler, 4, 0, priority=1)
    add(scheduler, 4, 1, priority=0)
    assert spans(run(scheduler)) == [(1, 0, 4)]


def test_no_more_sequences_than_allowed_nor_than_tokens():
    for max_num_seqs, tokens, expected in [(3, 32, 3), (8, 2, 2)]:
        scheduler = scheduler_of(max_num_seqs=max_num_seqs, tokens=tokens)
        for arrival in range(6):
            add(scheduler, 1, arrival)
        for _ in range(3):
            assert len(run(scheduler)) == expected


def test_a_prompt_that_can_never_fit_is_refused():
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    with pytest.raises(ValueError, match=r"prompt of 17 tokens .* 4 blocks of 4 tokens hold 16"):
        add(scheduler, 17, 0)
    assert not scheduler.waiting
    add(scheduler, 16, 0)
    assert spans(run(scheduler)) == [(0, 0, 16)]


def test_the_first_in_the_queue_waits_until_all_of_it_fits_and_is_not_overtaken():
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    first = add(scheduler, 5, 0)
    assert spans(run(scheduler)) == [(0, 0, 5)]
    add(scheduler, 12, 1)
    add(scheduler, 1, 2)
    assert spans(run(scheduler)) == [(0, 5, 6)]  # one of the two free blocks would do for the last
    scheduler.remove(first)
    assert spans(run(scheduler)) == [(2, 0, 1), (1, 0, 12)]


def test_the_newest_gives_way_and_is_recomputed_with_what_it_generated():
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    add(scheduler, 7, 0)
    young = add(scheduler, 7, 1)
    run(scheduler)  # both have two blocks, tokens 0 to 6
    run(scheduler)  # token 7 fills the last slot
    assert spans(run(scheduler)) == [(0, 8, 9)]
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting == [young]
    assert (young.num_computed, young.num_uncomputed, young.prompt_len) == (0, 9, 7)
    scheduler.remove(scheduler.running[0])
    assert spans(run(scheduler)) == [(1, 0, 9)]


def test_the_lowest_priority_gives_way_before_the_newest():
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    low = add(scheduler, 7, 0, priority=5)
    add(scheduler, 7, 1, priority=0)
    for _ in range(3):
        run(scheduler)
    assert scheduler.waiting == [low]


def test_a_preempted_sequence_goes_back_to_its_place_in_the_queue():
    scheduler = scheduler_of(max_num_seqs=2)
    sequences = [add(scheduler, 4, arrival) for arrival in range(4)]
    run(scheduler)
    scheduler.preempt(sequences[1])
    assert scheduler.waiting == sequences[1:]
    assert spans(run(scheduler)) == [(0, 4, 5), (1, 0, 5)]


def test_all_finish_when_each_may_take_the_whole_cache():
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    for arrival in range(64):
        add(scheduler, 1 + arrival % 16, arrival)
    for _ in range(5000):
        for chunk in run(scheduler):
            if len(chunk.sequence.token_ids) == 17:
                scheduler.remove(chunk.sequence)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.blocks.num_free == 4
    assert scheduler.num_preemptions > 0


def test_a_step_that_preempts_admits_nobody():
    """What was just freed is for those who still run; else they would take it back at once."""
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    for arrival in range(1, 3):
        add(scheduler, 7, arrival)
    run(scheduler)  # both have two blocks, tokens 0 to 6
    urgent = add(scheduler, 1, 0)  # first in order; a block that is freed is enough
    run(scheduler)  # token 7 fills the last slot
    assert spans(run(scheduler)) == [(1, 8, 9)]
    assert scheduler.num_preemptions == 1
    assert spans(run(scheduler)) == [(1, 9, 10), (0, 0, 1)]
    assert urgent in scheduler.running


def test_preemptions_and_recomputed_tokens_are_bounded():
    """A crowded cache costs recomputation; how much is a figure of this fixed load.

    Each request is more urgent than those before it, so a step that admits one with the blocks it
    has just freed makes the next step preempt again. An urgent prompt takes its tokens before those
    that are being computed, so more of them hold blocks at a time than in order of arrival (there
    39 preemptions and 820 tokens).
    """
    scheduler = scheduler_of(num_blocks=16, block_size=4, tokens=64)
    target = {arrival: 4 + arrival % 13 + 24 for arrival in range(32)}
    arrivals = iter(target)
    computed = 0
    for step in range(2000):
        if step % 3 == 0 and (arrival := next(arrivals, None)) is not None:
            add(scheduler, 4 + arrival % 13, arrival, priority=-arrival)
        for chunk in run(scheduler):
            computed += chunk.stop - chunk.start
            if len(chunk.sequence.token_ids) == target[chunk.sequence.order[1]]:
                scheduler.remove(chunk.sequence)
    assert not scheduler.running
    assert not scheduler.waiting
    needed = sum(target.values()) - len(target)  # the last token of each is never computed
    assert needed == 1035
    assert scheduler.num_preemptions <= 52
    assert computed - needed <= 1024


def test_forks_share_the_prompt_and_copy_its_last_block():
    scheduler = scheduler_of()
    parent = add(scheduler, 6, 0)
    (chunk,) = scheduler.schedule()
    commit(scheduler, chunk)
    children = [parent.fork(i) for i in (1, 2)]
    for child in children:
        scheduler.add_fork(parent, child)
    assert scheduler.blocks.num_free == 62
    for sequence in (parent, *children):
        sequence.token_ids.append(0)
    assert spans(scheduler.schedule()) == [(0, 6, 7)] * 3
    assert len(scheduler.blocks.copies) == 2
    assert scheduler.blocks.num_free == 60


def test_forks_without_a_place_wait_and_compute_the_prompt_themselves():
    scheduler = scheduler_of(max_num_seqs=1)
    parent = add(scheduler, 6, 0)
    run(scheduler)
    child = parent.fork(1)
    scheduler.add_fork(parent, child)
    assert scheduler.waiting == [child]
    scheduler.remove(parent)
    assert spans(run(scheduler)) == [(0, 0, 7)]


def test_a_cached_prefix_is_not_computed_again():
    scheduler = scheduler_of(prefix_caching=True)
    first = add(scheduler, 20, 0)
    run(scheduler)
    scheduler.remove(first)
    add(scheduler, 20, 1)
    assert spans(run(scheduler)) == [(1, 19, 20)]  # but for the last, whose logits are needed


def test_repeating_a_step_that_was_not_committed_gives_the_same():
    scheduler = scheduler_of()
    add(scheduler, 6, 0)
    run(scheduler)
    add(scheduler, 40, 1)
    assert spans(scheduler.schedule()) == spans(scheduler.schedule())


def test_a_more_urgent_sequence_takes_the_place_of_the_last():
    scheduler = scheduler_of(num_blocks=8, block_size=4, max_num_seqs=2)
    for arrival in range(2):
        add(scheduler, 10, arrival, priority=1)
    run(scheduler)
    assert len(scheduler.running) == 2
    urgent = add(scheduler, 12, 2)
    assert spans(run(scheduler)) == [(0, 10, 11), (2, 0, 12)]
    assert scheduler.num_preemptions == 1
    scheduler.remove(urgent)
    assert (1, 0, 11) in spans(run(scheduler))  # recomputed, with the token it had


def test_nothing_is_preempted_for_what_still_would_not_fit():
    scheduler = scheduler_of(num_blocks=8, block_size=4)
    add(scheduler, 18, 0)
    add(scheduler, 6, 1, priority=1)
    run(scheduler)
    add(scheduler, 30, 2, priority=-1)  # five blocks are of priority 0, so eight would fit
    run(scheduler)
    assert [one.order[1] for one in scheduler.running] == [2]
    scheduler = scheduler_of(num_blocks=8, block_size=4)
    add(scheduler, 18, 0)
    add(scheduler, 6, 1, priority=1)
    run(scheduler)
    add(scheduler, 30, 2)  # only two blocks could be taken from the one of less priority
    run(scheduler)
    assert [one.order[1] for one in scheduler.running] == [0, 1]
    assert scheduler.num_preemptions == 0


class FakeCost:
    """A step's seconds are 1 and 1/10 per token."""

    fixed = 1.0

    def seconds(self, chunks):
        return self.fixed + sum(chunk.stop - chunk.start for chunk in chunks) / 10

    def num_tokens(self, seconds, start):
        return max(1, int(seconds * 10 + 1e-6))


@pytest.mark.parametrize(
    ("max_step_seconds", "alone", "beside", "with_another"),
    [
        (0.5, 90, 18, 20),  # nine times the fixed second; 1.7 times the decode; twice the fixed
        (3.0, 90, 19, 20),  # what is left of 3 seconds; twice the fixed
        (50.0, 200, 22, 200),  # the tokens are the bound; at most three times the decode
    ],
)
def test_prompts_take_what_the_time_of_a_step_leaves(max_step_seconds, alone, beside, with_another):
    def fresh():
        blocks = BlockManager(512, 4, prefix_caching=False)
        return Scheduler(blocks, 8, 200, max_step_seconds=max_step_seconds, cost=FakeCost())

    scheduler = fresh()
    add(scheduler, 800, 0)
    assert sum(c.stop - c.start for c in scheduler.schedule()) == alone

    scheduler = fresh()
    add(scheduler, 1, 0)
    run(scheduler)
    add(scheduler, 800, 1)
    chunks = scheduler.schedule()
    assert spans(chunks)[0] == (0, 1, 2)
    assert sum(c.stop - c.start for c in chunks[1:]) == beside

    scheduler = fresh()
    for arrival in range(2):
        add(scheduler, 800, arrival)
    counts = {c.sequence.order[1]: c.stop - c.start for c in scheduler.schedule()}
    assert abs(sum(counts.values()) - with_another) <= 2  # the last chunk is at least one token
    assert counts[0] >= with_another // 8


def test_every_prompt_step_has_a_token_however_long_a_step_takes():
    blocks = BlockManager(512, 4, prefix_caching=False)
    scheduler = Scheduler(blocks, 8, 64, max_step_seconds=1e-9, cost=FakeCost())
    for arrival in range(4):
        add(scheduler, 200, arrival)
    for _ in range(100):
        run(scheduler)
    assert len(scheduler.running) == 4
    assert all(sequence.num_generated for sequence in scheduler.running)


def test_pending_tokens_are_those_of_prompts():
    scheduler = scheduler_of(tokens=32)
    add(scheduler, 4, 0)
    add(scheduler, 70, 1)
    assert scheduler.num_pending_tokens == 74
    run(scheduler)
    assert scheduler.num_pending_tokens == 70 - 28


def test_a_repeated_step_computes_the_next_tokens():
    """One token further step after step, blocks included; what comes between is not missed."""
    scheduler = scheduler_of(max_num_seqs=4)
    sequences = [add(scheduler, length, i) for i, length in enumerate((3, 6))]
    run(scheduler)
    decodes = run(scheduler)
    for step in range(1, 9):
        scheduler.repeat(decodes)
        again = run(scheduler)
        assert again is decodes
        assert spans(again) == [(0, 3 + step, 4 + step), (1, 6 + step, 7 + step)]
        assert [len(s.block_ids) for s in sequences] == [(3 + step) // 4 + 1, (6 + step) // 4 + 1]
    scheduler.repeat(decodes)
    add(scheduler, 5, 2)
    assert spans(run(scheduler)) == [(0, 12, 13), (1, 15, 16), (2, 0, 5)]
    decodes = run(scheduler)
    scheduler.repeat(decodes)
    scheduler.remove(sequences[0])
    assert spans(run(scheduler)) == [(1, 17, 18), (2, 6, 7)]
    decodes = run(scheduler)
    scheduler.repeat(decodes)
    scheduler.preempt(sequences[1])
    assert spans(run(scheduler))[0] == (2, 8, 9)


def test_a_repeated_step_without_blocks_preempts():
    scheduler = scheduler_of(num_blocks=4, max_num_seqs=2)
    for i in range(2):
        add(scheduler, 7, i)
    run(scheduler)
    decodes = run(scheduler)  # both blocks of both are full
    assert len(decodes) == 2
    scheduler.repeat(decodes)
    assert spans(run(scheduler)) == [(0, 8, 9)]
    assert scheduler.num_preemptions == 1
