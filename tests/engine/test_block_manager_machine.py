"""The block manager through random operations, with what every block should hold kept beside it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.sequence import Sequence, int32_list

EXAMPLES, STEPS = 300, 100  # some end early: 20,000 steps and more


def sequence_of(tokens, salt=0):
    tokens = int32_list(tokens)
    return Sequence(tokens, len(tokens), (0, 0, 0), len(tokens) - 1, cache_salt=salt)


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over {0, 1} come, are computed, grow, fork and go, in any order.

    `pages` is the cache: each slot holds the whole prefix up to its token, as real keys and values
    do. Whatever goes wrong with sharing, copying or eviction shows as a wrong prefix somewhere.
    """

    num_steps = 0

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), prefix_caching=st.booleans()
    )
    def start(self, num_blocks, block_size, prefix_caching):
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.pages = [[None] * block_size for _ in range(num_blocks)]
        self.sequences = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), salt=st.integers(0, 1))
    def allocate(self, tokens, salt):
        sequence = sequence_of(tokens, salt)
        before = self.snapshot()
        if self.blocks.allocate(sequence):
            assert sequence.num_computed < len(tokens)
            self.sequences.append(sequence)
        else:
            assert self.snapshot() == before
            assert len(tokens) > self.blocks.num_free * self.blocks.block_size

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 6))
    def compute(self, pick, count):
        sequence = self.sequences[pick % len(self.sequences)]
        for destination, source in self.blocks.copies.items():
            self.pages[destination] = list(self.pages[source])
        self.blocks.copied()
        stop = min(sequence.num_computed + count, len(sequence.token_ids))
        for position in range(sequence.num_computed, stop):
            index, offset = divmod(position, self.blocks.block_size)
            block_id = sequence.block_ids[index]
            assert self.blocks.num_owners(block_id) == 1, "a page with two owners is written"
            assert self.blocks._cached[block_id] is None, "a cached page is written"
            self.pages[block_id][offset] = prefix(sequence, position)
        sequence.num_computed = stop
        sequence.first_logit = max(sequence.first_logit, stop)
        self.blocks.index_full_blocks(sequence)

    @precondition(lambda self: self.computed())
    @rule(pick=st.integers(0, 99), token=st.integers(0, 1))
    def append(self, pick, token):
        sequence = self.computed()[pick % len(self.computed())]
        sequence.token_ids.append(token)
        before = self.snapshot()
        if not self.blocks.grow(sequence, 1):
            assert self.snapshot() == before
            assert self.blocks.num_free == 0
            sequence.token_ids.pop()

    @precondition(lambda self: self.computed())
    @rule(pick=st.integers(0, 99))
    def fork(self, pick):
        parent = self.computed()[pick % len(self.computed())]
        child = parent.fork(1)
        self.blocks.fork(parent, child)
        self.sequences.append(child)

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99))
    def release(self, pick):
        self.blocks.release(self.sequences.pop(pick % len(self.sequences)))

    @invariant()
    def owners_are_those_who_have_the_block(self):
        BlockManagerMachine.num_steps += 1
        tables = [block_id for s in self.sequences for block_id in s.block_ids]
        for block_id in range(self.blocks.num_blocks):
            assert self.blocks.num_owners(block_id) == tables.count(block_id)
        used = set(tables) | set(self.blocks.copies.values())
        free, idle = self.blocks._free, set(self.blocks._idle)
        assert len(used) + len(free) + len(idle) == self.blocks.num_blocks
        assert used | set(free) | idle == set(range(self.blocks.num_blocks))
        assert self.blocks.num_free == len(free) + len(idle)

    @invariant()
    def every_page_holds_its_sequences_prefix(self):
        pages = [list(page) for page in self.pages]
        for destination, source in self.blocks.copies.items():
            pages[destination] = list(self.pages[source])  # no source is a destination
        for sequence in self.sequences:
            for position in range(sequence.num_computed):
                index, offset = divmod(position, self.blocks.block_size)
                assert pages[sequence.block_ids[index]][offset] == prefix(sequence, position)

    @invariant()
    def the_prefix_cache_is_a_trie_of_what_the_pages_hold(self):
        names = {-1: (), -2: ()}
        cached = sorted(filter(None, self.blocks._cached), key=lambda entry: entry.prefix_id)
        assert len(cached) == len(self.blocks._index)
        for (parent_id, tokens), name in cached:  # a parent is named before its children
            assert parent_id in names, "a block outlived its parent"
            block_id = self.blocks._index[parent_id, tokens]
            assert self.blocks._cached[block_id].prefix_id == name
            text = (*names[parent_id], *memoryview(tokens).cast("i"))
            assert self.pages[block_id][-1][1] == text
            names[name] = text
        assert set(self.blocks._idle) <= set(self.blocks._index.values())

    def computed(self):
        return [s for s in self.sequences if not s.num_uncomputed]

    def snapshot(self):
        blocks = self.blocks
        lists = blocks._owners, blocks._free, blocks._idle, blocks._cached, blocks.copies.items()
        return [list(x) for x in lists], [list(s.block_ids) for s in self.sequences]

    def teardown(self):
        if not hasattr(self, "blocks"):
            return
        for sequence in self.sequences:
            self.blocks.release(sequence)
        assert not self.blocks.copies
        assert self.blocks.num_free == self.blocks.num_blocks
        assert not any(map(self.blocks.num_owners, range(self.blocks.num_blocks)))


def prefix(sequence, position):
    return sequence.cache_salt, tuple(sequence.token_ids[: position + 1])


def test_state_machine_of_20000_steps():
    BlockManagerMachine.num_steps = 0
    run_state_machine_as_test(
        BlockManagerMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
        ),
    )
    assert BlockManagerMachine.num_steps >= 20_000
