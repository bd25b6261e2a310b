"""Ownership of the KV cache's blocks: free list, owner counts, copy-on-write, prefix cache.

Every block is in one of three states: owned (by one or more sequences), free, or idle: without an
owner, but holding keys and values that the prefix cache can give to the next sequence that begins
with the same tokens.

An exception may interrupt any of the methods (a signal handler raises anywhere). What a sequence
knows of its own blocks, and which prefix a block holds, then stays valid: both change by plain
assignments, without a call between those that belong together. `recover` computes all else anew.

The prefix cache is a trie stored as one dictionary: (name of the parent prefix, token ids of the
next block) -> block. The key holds the tokens themselves and the dictionary compares them, so two
texts with equal hashes cannot be confused. A name is given once and never reused.

A sequence shares the full blocks that it finds. Of the next one it may have only the first tokens:
then it gets a copy of that block and writes on behind the common head. Beside full blocks, the
*tails* of prompts and of released sequences can be found: partly filled blocks, by the tokens they
hold. What is behind the head of a tail is still written by its owner, and by nobody else; nothing
follows a tail in the trie. The siblings behind one prefix are kept in order of their bytes, as the
longest common head is always with a neighbour: a search costs O(log siblings), whatever the texts.
"""

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import NamedTuple

from codellama_rt.engine.sequence import PrefixName, Sequence, int32_list

PrefixKey = tuple[PrefixName, bytes]  # (name of the parent, int32 token ids of the block)


class _CachedPrefix(NamedTuple):
    key: PrefixKey  # with fewer tokens than a block has: a tail
    prefix_id: int


class BlockManager:
    """Give blocks to sequences; hold no tensor and do O(1) work per block.

    Example:
        >>> from codellama_rt.engine.sequence import Sequence, int32_list
        >>> blocks = BlockManager(num_blocks=8, block_size=16)
        >>> prompt = Sequence(int32_list(range(40)), 40, (0, 0, 0), first_logit=39)
        >>> blocks.allocate(prompt), list(prompt.block_ids), blocks.num_free
        (True, [0, 1, 2], 5)
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        """Start with every block free.

        Args:
            num_blocks: number of blocks in the KV cache.
            block_size: tokens per block.
            prefix_caching: whether sequences with equal prefixes share blocks.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                "BlockManager: num_blocks and block_size must be >= 1, "
                f"got {num_blocks} and {block_size}; give the KV cache more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_queried_tokens = 0  # tokens looked up in the prefix cache
        self.num_hit_tokens = 0  # of these, found there
        self.num_partial_hit_tokens = 0  # of these, found as the head of a block
        # Told of each full block that is entered: in whose table, where, and which prefix it holds.
        self.on_full_block: Callable[[Sequence, int, object], None] | None = None
        self.copies: dict[int, int] = {}  # destination -> source: to be done before they are read
        self.tables_version = 0  # another one whenever a block is given, shared or taken back
        self._owners = [0] * num_blocks  # block -> number of tables and of copies that read it
        self._free = list(range(num_blocks))[::-1]  # pop() gives block 0 first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[PrefixKey, int] = {}  # prefix -> block
        self._siblings: dict[PrefixName, list[bytes]] = {}  # parent -> tokens of its keys, sorted
        self._cached: list[_CachedPrefix | None] = [None] * num_blocks  # block -> prefix
        self._next_prefix_id = 0

    @property
    def num_free(self) -> int:
        """Number of blocks a sequence can get now, those of idle prefixes included."""
        return len(self._free) + len(self._idle)

    def num_owners(self, block_id: int) -> int:
        """Return the number of sequences that have the block in their table."""
        return self._owners[block_id] - list(self.copies.values()).count(block_id)

    def num_needed(self, sequence: Sequence) -> int:
        """Return how many of the free blocks `allocate` would take for a sequence."""
        return self._num_needed(sequence, self._longest_cached_prefix(sequence))

    def num_cached_blocks(self, sequence: Sequence) -> int:
        """Return how many leading full blocks of a sequence `allocate` would find."""
        return len(self._longest_cached_prefix(sequence))

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how many leading tokens of a sequence `allocate` would find, if it has room."""
        hits = self._longest_cached_prefix(sequence)
        _, _, num_head = self._head_after(sequence, hits)
        return len(hits) * self.block_size + num_head

    def holds(self, block_id: int, prefix: object) -> bool:
        """Return whether a block still holds what `on_full_block` was told; in any thread.

        Nobody writes into it before this is False, and it never becomes True again.
        """
        return self._cached[block_id] is prefix

    def allocate(self, sequence: Sequence, *, is_request: bool = True) -> bool:
        """Give a sequence without blocks room for all its tokens, sharing cached blocks.

        A block whose head is shared is added to `copies`, unless it is an idle tail of which the
        sequence has all tokens: then the sequence writes on in it.

        Args:
            sequence: as said.
            is_request: whether hits are counted.

        Returns:
            False if they do not fit now; nothing has changed then.
        """
        assert not sequence.block_ids
        hits = self._longest_cached_prefix(sequence)
        num_spare = self.num_free - self._num_needed(sequence, hits)
        if num_spare < 0:
            return False
        num_hits = len(hits)
        prefix_id, source, num_head = self._head_after(sequence, hits)
        for block_id in hits:
            self._own(block_id)
        block_ids = int32_list(hits)
        if source is not None:
            if self._owners[source] == 0 and self._num_tokens(source) == num_head:
                self._own(source)
                block_ids.append(source)
            elif self._owners[source] > 0 or num_spare > 0:
                self._own(source)  # on behalf of the copy
                destination = self._take()
                block_ids.append(destination)
                self.copies[destination] = source
            else:
                num_head = 0
        missing = self._blocks_for(len(sequence.token_ids)) - len(block_ids)
        block_ids.extend([self._take() for _ in range(missing)])
        sequence.block_ids = block_ids
        sequence.num_indexed_blocks = num_hits
        sequence.num_computed = num_hits * self.block_size + num_head
        sequence.prefix_id = prefix_id
        if self.prefix_caching and is_request:
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed
            self.num_partial_hit_tokens += num_head
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens, in blocks that no other sequence reads.

        A block that must be copied first is added to `copies`; until `copied` is called, its source
        cannot be given to anyone else.

        Args:
            sequence: a sequence that has been allocated.
            num_tokens: number of tokens after `num_computed` that will be written.

        Returns:
            False if there is no room; nothing has changed then.
        """
        block_ids = sequence.block_ids
        first = sequence.num_computed // self.block_size
        missing = self._blocks_for(sequence.num_computed + num_tokens) - len(block_ids)
        shared = first < len(block_ids) and self.num_owners(block_ids[first]) > 1
        if missing <= 0 and not shared:
            sequence.num_writable = len(block_ids) * self.block_size
            return True
        if max(missing, 0) + shared > self.num_free:
            return False
        if shared:  # only the last, partly filled block of a fork: full ones are never rewritten
            destination = self._take()
            self.copies[destination] = block_ids[first]  # the copy owns it in the table's place
            block_ids[first] = destination
        block_ids.extend([self._take() for _ in range(missing)])
        sequence.num_writable = len(block_ids) * self.block_size
        return True

    def copied(self) -> None:
        """Forget the copies, which have been done."""
        for source in self.copies.values():
            self._disown(source)
        self.copies = {}

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same computed tokens, share the blocks of these."""
        assert not child.block_ids
        parent.num_writable = child.num_writable = 0
        block_ids = parent.block_ids[: self._blocks_for(parent.num_computed)]
        for block_id in block_ids:
            self._owners[block_id] += 1
        child.block_ids = block_ids
        child.num_computed = parent.num_computed
        child.num_indexed_blocks = parent.num_indexed_blocks
        child.prefix_id = parent.prefix_id

    def index_blocks(self, sequence: Sequence) -> None:
        """Enter the blocks filled since the last call into the prefix cache, and a prompt's tail.

        If another block already holds the same prefix, the sequence takes that one and returns its
        own: equal tokens have bitwise equal keys and values, whichever step computed them. So the
        parent of a cached block is always cached too, and becomes idle no earlier.
        """
        if not self.prefix_caching or sequence.prefix_id is None:
            return
        size = self.block_size
        while (sequence.num_indexed_blocks + 1) * size <= sequence.num_computed:
            i = sequence.num_indexed_blocks
            key = (sequence.prefix_id, sequence.token_ids[i * size : (i + 1) * size].tobytes())
            own = sequence.block_ids[i]
            block_id = self._index.get(key)
            if block_id is None:
                block_id = own
                self._enter(own, key)
                if self.on_full_block is not None:
                    self.on_full_block(sequence, i, self._cached[own])
            elif block_id != own:
                if self._cached[own] is not None:  # a head of the other
                    self._forget(own)
                self._own(block_id)
                self._disown(own)
                sequence.block_ids[i] = block_id
            sequence.prefix_id = self._cached[block_id].prefix_id
            sequence.num_indexed_blocks += 1
        if sequence.num_computed == sequence.prompt_len:
            self._index_tail(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks; cached ones can still be found until their memory is needed."""
        self.index_blocks(sequence)
        self._index_tail(sequence)
        block_ids = sequence.block_ids
        sequence.leave_cache()  # before a copy into one of the blocks is forgotten
        for block_id in reversed(block_ids):  # evict the end of a prefix first
            self._disown(block_id)
            if (source := self.copies.pop(block_id, None)) is not None:
                self._disown(source)

    def reset_prefix_cache(self, sequences: Iterable[Sequence]) -> bool:
        """Forget all cached prefixes; what has been computed so far is not found any more.

        Args:
            sequences: all that have blocks; they keep them, and enter none until they are released.

        Returns:
            Whether none has.
        """
        holding = [sequence for sequence in sequences if sequence.block_ids]
        for sequence in holding:
            sequence.prefix_id = None
        self._cached = [None] * self.num_blocks
        self.recover(holding)
        return not holding

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """Compute owners, free blocks and the index anew, after an exception.

        Args:
            sequences: all that are to keep their blocks.
        """
        owners = Counter(block_id for sequence in sequences for block_id in sequence.block_ids)
        self.copies = {to: source for to, source in self.copies.items() if to in owners}
        owners.update(self.copies.values())
        cached = self._cached
        self._owners = [owners[block_id] for block_id in range(self.num_blocks)]
        unowned = [block_id for block_id in range(self.num_blocks) if not owners[block_id]]
        self._free = [block_id for block_id in reversed(unowned) if cached[block_id] is None]
        idle = {block_id for block_id in unowned if cached[block_id] is not None}
        lost = sorted(idle.difference(self._idle), key=lambda i: -cached[i].prefix_id)
        # A prefix is named after the prefixes that it continues, so those are evicted later.
        self._idle = OrderedDict.fromkeys([*(i for i in self._idle if i in idle), *lost])
        self._index = {cached[i].key: i for i in range(self.num_blocks) if cached[i] is not None}
        self._siblings = {}
        for parent, tokens in sorted(self._index, key=lambda key: key[1]):
            self._siblings.setdefault(parent, []).append(tokens)

    def _num_needed(self, sequence: Sequence, hits: list[int]) -> int:
        num_idle_hits = sum(self._owners[block_id] == 0 for block_id in hits)
        return self._blocks_for(len(sequence.token_ids)) - len(hits) + num_idle_hits

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _longest_cached_prefix(self, sequence: Sequence) -> list[int]:
        hits: list[int] = []
        prefix_id, size = sequence.prefix_id, self.block_size
        # Tokens from first_logit on must be computed even on a hit: their logits are needed.
        for start in range(0, sequence.first_logit - size + 1, size):
            key = (prefix_id, sequence.token_ids[start : start + size].tobytes())
            block_id = self._index.get(key)
            if block_id is None:
                break
            hits.append(block_id)
            prefix_id = self._cached[block_id].prefix_id
        return hits

    def _head_after(
        self, sequence: Sequence, hits: list[int]
    ) -> tuple[PrefixName, int | None, int]:
        """Return the prefix that a sequence's hits hold, and `_longest_head` after them."""
        prefix_id = self._cached[hits[-1]].prefix_id if hits else sequence.prefix_id
        return prefix_id, *self._longest_head(sequence, prefix_id, len(hits) * self.block_size)

    def _longest_head(
        self, sequence: Sequence, parent: PrefixName, start: int
    ) -> tuple[int | None, int]:
        """Return the block that begins with most of a sequence's next tokens, and how many.

        Args:
            sequence: it has hits up to `start`, and needs the tokens from `first_logit` on.
            parent: the prefix up to `start`.
            start: position of the next token.

        Returns:
            (None, 0) if there is none.
        """
        stop = min(start + self.block_size, sequence.first_logit)
        siblings = self._siblings.get(parent)
        if siblings is None or stop <= start:
            return None, 0
        tokens = sequence.token_ids[start:stop].tobytes()
        i = bisect_left(siblings, tokens)
        heads = [(_num_common(tokens, one), one) for one in siblings[max(0, i - 1) : i + 1]]
        num_head, found = max(heads)
        return (self._index[parent, found], num_head) if num_head else (None, 0)

    def _index_tail(self, sequence: Sequence) -> None:
        """Let the partly filled block of a sequence, if any, be found by what it holds so far."""
        i = sequence.num_indexed_blocks
        tokens = sequence.token_ids[i * self.block_size : sequence.num_computed].tobytes()
        parent = sequence.prefix_id
        if not tokens or parent is None or not self.prefix_caching:
            return
        block_id = sequence.block_ids[i]
        if block_id in self.copies:  # yet to be done
            return
        siblings = self._siblings.get(parent, [])
        at = bisect_left(siblings, tokens)
        if at == len(siblings) or not siblings[at].startswith(tokens):
            self._enter(block_id, (parent, tokens))

    def _num_tokens(self, block_id: int) -> int:
        return len(self._cached[block_id].key[1]) // _ITEM_SIZE

    def _enter(self, block_id: int, key: PrefixKey) -> None:
        """Let a block be found by this key, and by no other."""
        parent, tokens = key
        prefix, old = _CachedPrefix(key, self._next_prefix_id), self._cached[block_id]
        self._next_prefix_id += 1
        self._cached[block_id] = prefix
        if old is not None:
            self._delist(old.key)
        self._index[key] = block_id
        insort(self._siblings.setdefault(parent, []), tokens)

    def _forget(self, block_id: int) -> None:
        """Let a block not be found any more."""
        prefix = self._cached[block_id]
        self._cached[block_id] = None
        self._delist(prefix.key)

    def _delist(self, key: PrefixKey) -> None:
        parent, tokens = key
        del self._index[key]
        siblings = self._siblings[parent]
        del siblings[bisect_left(siblings, tokens)]
        if not siblings:
            del self._siblings[parent]

    def _own(self, block_id: int) -> None:
        self.tables_version += 1
        if self._owners[block_id] == 0:
            del self._idle[block_id]
        self._owners[block_id] += 1

    def _disown(self, block_id: int) -> None:
        assert self._owners[block_id] > 0, f"block {block_id} freed twice"
        self.tables_version += 1
        self._owners[block_id] -= 1
        if self._owners[block_id] > 0:
            return
        if self._cached[block_id] is None:
            self._free.append(block_id)
        else:
            self._idle[block_id] = None

    def _take(self) -> int:
        self.tables_version += 1
        if self._free:
            block_id = self._free.pop()
        else:
            block_id = next(iter(self._idle))
            self._forget(block_id)  # first, or `recover` would make it the last to be evicted
            del self._idle[block_id]
        self._owners[block_id] = 1
        return block_id


_ITEM_SIZE = int32_list().itemsize


def _num_common(a: bytes, b: bytes) -> int:
    """Return how many tokens two lists of int32 have in common at their beginnings."""
    pairs = zip(memoryview(a).cast("i"), memoryview(b).cast("i"), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
