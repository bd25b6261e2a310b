"""Ownership of the KV cache's blocks: free list, owner counts, copy-on-write, prefix cache.

Every block is in one of three states: owned (by one or more sequences), free, or idle: without an
owner, but holding keys and values that the prefix cache can give to the next sequence that begins
with the same tokens.

The prefix cache is a trie stored as one dictionary: (name of the parent prefix, token ids of the
next full block) -> block. The key holds the tokens themselves and the dictionary compares them, so
two texts with equal hashes cannot be confused. A name is given once and never reused.
"""

from collections import OrderedDict
from typing import NamedTuple

from codellama_rt.engine.sequence import Sequence

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
        self._owners = [0] * num_blocks  # block -> number of sequences with it in their table
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
        return self._owners[block_id]

    def allocate(self, sequence: Sequence) -> bool:
        """Give a sequence without blocks room for all its tokens, sharing cached blocks.

        Returns:
            False if they do not fit now; nothing has changed then.
        """
        assert not sequence.block_ids
        hits = self._longest_cached_prefix(sequence)
        num_idle_hits = sum(self._owners[block_id] == 0 for block_id in hits)
        missing = self._blocks_for(len(sequence.token_ids)) - len(hits)
        if missing > self.num_free - num_idle_hits:
            return False
        for block_id in hits:
            self._own(block_id)
        sequence.block_ids.extend(hits)
        sequence.block_ids.extend([self._take() for _ in range(missing)])
        sequence.num_indexed_blocks = len(hits)
        sequence.num_computed = len(hits) * self.block_size
        if hits:
            sequence.prefix_id = self._cached[hits[-1]].prefix_id
        if self.prefix_caching:
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed
        return True

    def grow(self, sequence: Sequence, num_tokens: int, copies: list[tuple[int, int]]) -> bool:
        """Make room for the next `num_tokens` tokens, in blocks that no other sequence reads.

        Args:
            sequence: a sequence that has been allocated.
            num_tokens: number of tokens after `num_computed` that will be written.
            copies: receives (source, destination) of a block that must be copied first.

        Returns:
            False if there is no room; nothing has changed then.
        """
        block_ids = sequence.block_ids
        first = sequence.num_computed // self.block_size
        missing = self._blocks_for(sequence.num_computed + num_tokens) - len(block_ids)
        shared = first < len(block_ids) and self._owners[block_ids[first]] > 1
        if missing <= 0 and not shared:
            return True
        if max(missing, 0) + shared > self.num_free:
            return False
        if shared:  # only the last, partly filled block of a fork: full ones are never rewritten
            source, block_ids[first] = block_ids[first], self._take()
            self._disown(source)
            copies.append((source, block_ids[first]))
        block_ids.extend([self._take() for _ in range(missing)])
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens, share all blocks of `parent`."""
        assert not child.block_ids
        for block_id in parent.block_ids:
            self._owners[block_id] += 1
        child.block_ids.extend(parent.block_ids)
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
            block_id = self._index.setdefault(key, own)
            if block_id != own:
                self._own(block_id)
                self._disown(own)
                sequence.block_ids[i] = block_id
            elif self._cached[own] is None:
                self._cached[own] = _CachedPrefix(key, self._next_prefix_id)
                self._next_prefix_id += 1
            sequence.prefix_id = self._cached[block_id].prefix_id
            sequence.num_indexed_blocks += 1

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks; cached ones can still be found until their memory is needed."""
        for block_id in reversed(sequence.block_ids):  # evict the end of a prefix first
            self._disown(block_id)
        sequence.leave_cache()

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
        if self._owners[block_id] == 0:
            del self._idle[block_id]
        self._owners[block_id] += 1

    def _disown(self, block_id: int) -> None:
        assert self._owners[block_id] > 0, f"block {block_id} freed twice"
        self._owners[block_id] -= 1
        if self._owners[block_id] > 0:
            return
        if self._cached[block_id] is None:
            self._free.append(block_id)
        else:
            self._idle[block_id] = None

    def _take(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._idle.popitem(last=False)
            del self._index[self._cached[block_id].key]
            self._cached[block_id] = None
        self._owners[block_id] = 1
        return block_id
