"""Ownership of the KV cache's blocks: free list, owner counts, copy-on-write, prefix cache.

Every block is in one of three states: owned (by one or more sequences), free, or idle: without an
owner, but holding keys and values that the prefix cache can give to the next sequence that begins
with the same tokens.

An exception may interrupt any of the methods (a signal handler raises anywhere). What a sequence
knows of its own blocks, and which prefix a block holds, then stays valid: both change by plain
assignments, without a call between those that belong together. `recover` computes all else anew.

The prefix cache is a trie stored as one dictionary: (name of the parent prefix, token ids of the
next full block) -> block. The key holds the tokens themselves and the dictionary compares them, so
two texts with equal hashes cannot be confused. A name is given once and never reused.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from codellama_rt.engine.sequence import Sequence, int32_list

PrefixKey = tuple[int, bytes]  # (prefix_id of the parent, int32 token ids of the block)


class _CachedPrefix(NamedTuple):
    key: PrefixKey
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
        self.num_queried_tokens = 0  # prompt tokens looked up in the prefix cache, and hits
        self.num_hit_tokens = 0
        # Told of each full block that is entered: in whose table, where, and which prefix it holds.
        self.on_full_block: Callable[[Sequence, int, object], None] | None = None
        self.copies: dict[int, int] = {}  # destination -> source: to be done before they are read
        self.tables_version = 0  # another one whenever a block is given, shared or taken back
        self._owners = [0] * num_blocks  # block -> number of tables and of copies that read it
        self._free = list(range(num_blocks))[::-1]  # pop() gives block 0 first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[PrefixKey, int] = {}  # prefix -> block
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

    def holds(self, block_id: int, prefix: object) -> bool:
        """Return whether a block still holds what `on_full_block` was told; in any thread.

        Nobody writes into it before this is False, and it never becomes True again.
        """
        return self._cached[block_id] is prefix

    def allocate(self, sequence: Sequence, *, is_request: bool = True) -> bool:
        """Give a sequence without blocks room for all its tokens, sharing cached blocks.

        Args:
            sequence: as said.
            is_request: whether hits are counted.

        Returns:
            False if they do not fit now; nothing has changed then.
        """
        assert not sequence.block_ids
        hits = self._longest_cached_prefix(sequence)
        if self._num_needed(sequence, hits) > self.num_free:
            return False
        for block_id in hits:
            self._own(block_id)
        block_ids, num_hits = int32_list(hits), len(hits)
        missing = self._blocks_for(len(sequence.token_ids)) - num_hits
        block_ids.extend([self._take() for _ in range(missing)])
        sequence.block_ids = block_ids
        sequence.num_indexed_blocks = num_hits
        sequence.num_computed = num_hits * self.block_size
        if hits:
            sequence.prefix_id = self._cached[hits[-1]].prefix_id
        if self.prefix_caching and is_request:
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed
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
        """Let `child`, which has the same computed tokens, share all blocks of `parent`."""
        assert not child.block_ids
        parent.num_writable = child.num_writable = 0
        for block_id in parent.block_ids:
            self._owners[block_id] += 1
        child.block_ids = parent.block_ids[:]
        child.num_computed = parent.num_computed
        child.num_indexed_blocks = parent.num_indexed_blocks
        child.prefix_id = parent.prefix_id

    def index_full_blocks(self, sequence: Sequence) -> None:
        """Enter the blocks filled since the last call into the prefix cache.

        If another block already holds the same prefix, the sequence takes that one and returns its
        own: equal tokens have bitwise equal keys and values, whichever step computed them. So the
        parent of a cached block is always cached too, and becomes idle no earlier.
        """
        if not self.prefix_caching:
            return
        size = self.block_size
        while (sequence.num_indexed_blocks + 1) * size <= sequence.num_computed:
            i = sequence.num_indexed_blocks
            key = (sequence.prefix_id, sequence.token_ids[i * size : (i + 1) * size].tobytes())
            own = sequence.block_ids[i]
            block_id = self._index.get(key)
            if block_id is None:
                block_id, prefix = own, _CachedPrefix(key, self._next_prefix_id)
                self._next_prefix_id += 1
                self._cached[own] = prefix
                self._index[key] = own
                if self.on_full_block is not None:
                    self.on_full_block(sequence, i, prefix)
            elif block_id != own:
                self._own(block_id)
                self._disown(own)
                sequence.block_ids[i] = block_id
            sequence.prefix_id = self._cached[block_id].prefix_id
            sequence.num_indexed_blocks += 1

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks; cached ones can still be found until their memory is needed."""
        for block_id in reversed(sequence.block_ids):  # evict the end of a prefix first
            self._disown(block_id)
            if (source := self.copies.pop(block_id, None)) is not None:
                self._disown(source)
        sequence.leave_cache()

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
            del self._idle[block_id]
            del self._index[self._cached[block_id].key]
            self._cached[block_id] = None
        self._owners[block_id] = 1
        return block_id
