"""The block manager through random operations, with what every block should hold kept beside it."""

import gc

from helpers.faults import Faults
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
ENDLESS = 400  # blocks: more than a run of so many steps uses
SALTS = st.integers(0, 1)
PICKS = st.integers(0, 99)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
seen = set()  # of what the steps have come across


def sequence_of(tokens, salt, num_logits):
    tokens = int32_list(tokens)
    first_logit = max(0, len(tokens) - num_logits)
    return Sequence(tokens, len(tokens), (0, 0, 0), first_logit, cache_salt=salt)


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over {0, 1} come, are computed, grow, fork and go, in any order.

    `pages` is the cache: each slot holds the whole prefix up to its token, as real keys and values
    do. Whatever goes wrong with sharing, copying or eviction shows as a wrong prefix somewhere.
    `known` are the texts that an endless cache would have; `is_endless` says whether this one is.
    """

    num_steps = 0

    @initialize(
        num_blocks=st.integers(1, 12) | st.just(ENDLESS),
        block_size=st.integers(1, 4),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks, block_size, prefix_caching):
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.is_endless = num_blocks == ENDLESS
        self.pages = {}
        self.sequences = []
        self.known = set()

    @rule(tokens=TOKENS, salt=SALTS, num_logits=st.integers(1, 3))
    def allocate(self, tokens, salt, num_logits):
        sequence = sequence_of(tokens, salt, num_logits)
        before, most = self.snapshot(), self.longest_found(sequence, self.cached_texts())
        is_whole = self.blocks.num_needed(sequence) < self.blocks.num_free
        if self.blocks.allocate(sequence):
            rest = sequence.num_computed % self.blocks.block_size
            full = most - most % self.blocks.block_size
            assert sequence.num_computed in ({most} if is_whole else {most, full})
            if self.is_endless and self.blocks.prefix_caching:
                assert sequence.num_computed == self.longest_found(sequence, self.known)
            self.sequences.append(sequence)
            self.see("head copied", rest and self.copies_into(sequence))
            self.see("tail taken over", rest and not self.copies_into(sequence))
        else:
            assert self.snapshot() == before
            assert len(tokens) > self.blocks.num_free * self.blocks.block_size

    @rule()
    def copy(self):
        for destination, source in self.blocks.copies.items():
            self.pages[destination] = dict(self.pages[source])
        self.blocks.copied()

    @precondition(lambda self: self.sequences)
    @rule(pick=PICKS, count=st.integers(1, 6))
    def compute(self, pick, count):
        self.copy()
        sequence = self.sequences[pick % len(self.sequences)]
        stop = min(sequence.num_computed + count, len(sequence.token_ids))
        self.write(sequence, stop)
        sequence.num_computed = stop
        sequence.first_logit = max(sequence.first_logit, stop)
        self.index(sequence)

    @precondition(lambda self: self.computed())
    @rule(pick=PICKS, token=st.integers(0, 1))
    def append(self, pick, token):
        sequence = self.computed()[pick % len(self.computed())]
        sequence.token_ids.append(token)
        before = self.snapshot()
        if not self.blocks.grow(sequence, 1):
            assert self.snapshot() == before
            assert self.blocks.num_free == 0
            sequence.token_ids.pop()

    @precondition(lambda self: self.computed())
    @rule(pick=PICKS, count=st.integers(1, 5))
    def speculate(self, pick, count):
        """Write behind what counts as computed, as a step does whose proposals are refused."""
        sequence = self.computed()[pick % len(self.computed())]
        if self.blocks.grow(sequence, count):
            self.copy()
            sequence.token_ids.extend([2] * count)
            self.write(sequence, len(sequence.token_ids))
            del sequence.token_ids[sequence.num_computed :]

    @precondition(lambda self: self.computed())
    @rule(pick=PICKS)
    def fork(self, pick):
        parent = self.computed()[pick % len(self.computed())]
        child = parent.fork(1)
        self.blocks.fork(parent, child)
        self.sequences.append(child)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICKS)
    def release(self, pick):
        sequence = self.sequences.pop(pick % len(self.sequences))
        self.know(sequence, whole=not self.copies_into(sequence))
        self.blocks.release(sequence)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICKS)
    def finish(self, pick):
        pick %= len(self.sequences)
        self.compute(pick, 99)
        self.release(pick)

    @rule(at=st.integers(0, 20) | st.just(99), happens=st.sampled_from([False] * 9 + [True]))
    def reset(self, at, happens):
        if happens:
            self.interrupt(at, self.blocks.reset_prefix_cache, self.sequences)
            self.blocks.reset_prefix_cache(self.sequences)
            self.known.clear()
            assert not any(self.blocks._cached)
            self.see("reset beside owners", self.sequences)

    @rule(tokens=TOKENS, salt=SALTS, at=st.integers(0, 60))
    def interrupted_allocate(self, tokens, salt, at):
        sequence = sequence_of(tokens, salt, 1)
        self.interrupt(at, self.blocks.allocate, sequence, keeping=[sequence])
        if sequence.block_ids:
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICKS, at=st.integers(0, 60), keeps=st.booleans())
    def interrupted_release(self, pick, at, keeps):
        sequence = self.sequences.pop(pick % len(self.sequences))
        self.know(sequence, whole=not self.copies_into(sequence), certain=False)
        self.interrupt(at, self.blocks.release, sequence, keeping=[sequence] if keeps else [])
        if keeps and sequence.block_ids:
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICKS, at=st.integers(0, 60))
    def interrupted_index(self, pick, at):
        self.copy()
        sequence = self.sequences[pick % len(self.sequences)]
        stop = len(sequence.token_ids)
        self.write(sequence, stop)
        sequence.num_computed = stop
        sequence.first_logit = max(sequence.first_logit, stop)
        self.interrupt(at, self.blocks.index_blocks, sequence)
        self.index(sequence)

    @invariant()
    def owners_are_those_who_have_the_block(self):
        BlockManagerMachine.num_steps += 1
        tables = [block_id for s in self.sequences for block_id in s.block_ids]
        used = set(tables) | set(self.blocks.copies.values())
        for block_id in used:
            assert self.blocks.num_owners(block_id) == tables.count(block_id)
        assert sum(self.blocks._owners) == len(tables) + len(self.blocks.copies)
        free, idle = self.blocks._free, set(self.blocks._idle)
        assert len(used) + len(free) + len(idle) == self.blocks.num_blocks
        assert used | set(free) | idle == set(range(self.blocks.num_blocks))
        assert self.blocks.num_free == len(free) + len(idle)

    @invariant()
    def every_page_holds_its_sequences_prefix(self):
        pages = dict(self.pages)
        for destination, source in self.blocks.copies.items():
            pages[destination] = self.pages[source]  # no source is a destination
        for sequence in self.sequences:
            for position in range(sequence.num_computed):
                index, offset = divmod(position, self.blocks.block_size)
                assert pages[sequence.block_ids[index]][offset] == prefix(sequence, position)

    @invariant()
    def the_prefix_cache_is_a_trie_of_what_the_pages_hold(self):
        for block_id, (salt, text) in self.cached_texts().items():
            offset = (len(text) - 1) % self.blocks.block_size
            assert block_id not in self.blocks.copies
            assert self.pages[block_id][offset] == (salt, text)
        siblings = self.blocks._siblings
        assert all(list(tokens) == sorted(tokens) for tokens in siblings.values())
        listed = {(parent, tokens) for parent, its in siblings.items() for tokens in its}
        assert listed == set(self.blocks._index)
        assert set(self.blocks._idle) <= set(self.blocks._index.values())
        self.check_eviction_order()

    def check_eviction_order(self):
        """A block is evicted before the one whose text it continues."""
        never = self.blocks.num_blocks
        order = {block_id: at for at, block_id in enumerate(self.blocks._idle)}
        names = {one.prefix_id: block_id for block_id, one in enumerate(self.blocks._cached) if one}
        for (parent, _), block_id in self.blocks._index.items():
            if parent in names:
                own = order.get(block_id, never)
                assert order.get(names[parent], never) >= own, "the parent is evicted first"

    def write(self, sequence, stop):
        """Write as a step does: nothing that anyone else reads, or that can be found."""
        for position in range(sequence.num_computed, stop):
            index, offset = divmod(position, self.blocks.block_size)
            block_id = sequence.block_ids[index]
            assert self.blocks.num_owners(block_id) == 1, "a page with two owners is written"
            found_by = self.blocks._cached[block_id]
            assert found_by is None or offset >= len(found_by.key[1]) // 4, "a cached slot"
            self.pages.setdefault(block_id, {})[offset] = prefix(sequence, position)

    def index(self, sequence):
        self.blocks.index_blocks(sequence)
        self.know(sequence, whole=sequence.num_computed == sequence.prompt_len)

    def know(self, sequence, *, whole, certain=True):
        """Note what an endless cache has of a sequence: its full blocks, or all of it."""
        if sequence.prefix_id is None:
            return
        stop = sequence.num_computed
        if not whole:
            stop -= stop % self.blocks.block_size
        self.known.add((sequence.cache_salt, tuple(sequence.token_ids[:stop])))
        self.is_endless = self.is_endless and certain

    def interrupt(self, at, call, *arguments, keeping=()):
        """Raise at one of a method's calls, or let it end; then recover as the engine does."""
        gc.disable()  # what it calls would count, and runs at other times in each process
        try:
            Faults(at, KeyboardInterrupt).call(call, *arguments)
        except KeyboardInterrupt:
            self.see(f"{call.__name__} interrupted", True)
        finally:
            gc.enable()
        self.blocks.recover([*self.sequences, *keeping])

    def cached_texts(self):
        """Return what the cache says its blocks hold, by block: (salt, tokens up to their end)."""
        names, texts = {(0,): (0, ()), (1,): (1, ())}, {}
        entries = [(block_id, entry) for block_id, entry in enumerate(self.blocks._cached) if entry]
        assert len(entries) == len(self.blocks._index)
        for block_id, (key, name) in sorted(entries, key=lambda one: one[1].prefix_id):
            parent, tokens = key  # a parent is named before its children
            assert parent in names, "a block outlived its parent, or follows a tail"
            assert self.blocks._index[key] == block_id
            salt, before = names[parent]
            texts[block_id] = salt, (*before, *memoryview(tokens).cast("i"))
            if len(tokens) == 4 * self.blocks.block_size:
                names[name] = texts[block_id]
        return texts

    def longest_found(self, sequence, texts):
        """Return how many tokens a sequence has in common with one of these texts."""
        values = texts.values() if isinstance(texts, dict) else texts
        wanted = sequence.token_ids[: sequence.first_logit]
        counts = [0]
        for salt, text in values:
            if salt == sequence.cache_salt:
                pairs = list(zip(wanted, text, strict=False))
                counts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        return max(counts)

    def copies_into(self, sequence):
        return any(block_id in self.blocks.copies for block_id in sequence.block_ids)

    def see(self, what, happened):
        if happened:
            seen.add(what)

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
    seen.clear()
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
    assert seen == {  # were one never to happen, this would prove less
        "head copied",
        "tail taken over",
        "reset beside owners",
        "allocate interrupted",
        "release interrupted",
        "index_blocks interrupted",
        "reset_prefix_cache interrupted",
    }
