"""One sequence being generated: its tokens, its place in the queue and in the KV cache."""

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

# Of a cached prefix; a tuple is the empty prefix of its cache_salt.
PrefixName = int | tuple[Hashable]


class CacheSalt(NamedTuple):
    """What tells sequences apart that must not share cached prefixes, equal tokens or not.

    Args:
        caller: as given with the request, or None.
        adapter: number of the LoRA adapter; 0: none.
        rope: which rotations long prompts have, under RoPE scaling that depends on the length.
    """

    caller: str | None = None
    adapter: int = 0
    rope: int = 0


_NO_SALT = CacheSalt()


def int32_list(values: object = ()) -> array:
    """Return a growable list of int32 that NumPy can view without copying single elements."""
    return array("i", values)


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one sample and how many of them are computed.

    The prompt and the generated tokens are one list: to the scheduler a preempted sequence is just
    a longer prompt. `prompt_len` stays that of the original prompt.

    Args:
        token_ids: int32 array, the prompt; generated tokens are appended.
        prompt_len: tokens of the original prompt.
        order: (priority, arrival, sample index); the smallest goes first and is preempted last.
        first_logit: position of the first token whose logits (of the next token) are needed; they
            are used as soon as they are computed.
        cache_salt: sequences share cached prefixes only if their salts are equal.
        adapter: a LoraAdapter applied to all its tokens, or None.
    """

    token_ids: array
    prompt_len: int
    order: tuple[int, int, int]
    first_logit: int
    cache_salt: Hashable = _NO_SALT
    adapter: object | None = None
    num_stored_blocks: int = 0  # leading full blocks that are on disk, as far as known
    num_preemptions: int = 0  # how often it has lost its blocks
    # Place in the KV cache, managed by BlockManager; empty while the sequence waits.
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    block_ids: array = field(default_factory=int32_list)
    num_writable: int = 0  # tokens that fit its blocks, and no other sequence reads the last one
    num_indexed_blocks: int = 0  # leading full blocks known to the prefix cache
    # The prefix cache's name for the text of those blocks; None: it was reset, and this sequence
    # enters nothing computed before into the new one.
    prefix_id: PrefixName | None = field(init=False)

    def __post_init__(self) -> None:
        """Start outside the KV cache."""
        self.leave_cache()

    def leave_cache(self) -> None:
        """Forget the place in the KV cache: every token has to be computed again.

        The logits of those that were computed have been used, and are not needed again.
        """
        no_blocks, first_logit = int32_list(), max(self.first_logit, self.num_computed)
        self.first_logit = first_logit
        self.block_ids = no_blocks
        self.num_computed = 0
        self.num_writable = 0
        self.num_indexed_blocks = 0
        self.prefix_id = (self.cache_salt,)

    def fork(self, index: int, *, first_logit: int | None = None) -> "Sequence":
        """Return a sample with the same tokens and no place in the KV cache yet."""
        return Sequence(
            token_ids=self.token_ids[:],
            prompt_len=self.prompt_len,
            order=(*self.order[:2], index),
            first_logit=self.first_logit if first_logit is None else first_logit,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
        )

    def prefix(self, num_tokens: int) -> "Sequence":
        """Return the first tokens as a sequence without place in the KV cache, and no logits."""
        return Sequence(
            token_ids=self.token_ids[:num_tokens],
            prompt_len=num_tokens,
            order=self.order,
            first_logit=num_tokens,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
        )

    @property
    def num_uncomputed(self) -> int:
        """Number of tokens to compute before the next one can be sampled: 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Number of tokens after the original prompt."""
        return len(self.token_ids) - self.prompt_len


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens [start, stop) of one sequence, computed together in one step.

    Args:
        sequence: whose tokens.
        start: position of the first.
        stop: position after the last.
        num_logits: how many of the last tokens need logits: 0 in the middle of a prompt.
        draft: the last of these tokens, if they are only proposed, and not the sequence's yet.
    """

    sequence: Sequence
    start: int
    stop: int
    num_logits: int
    draft: array | tuple[()] = ()

    @property
    def samples(self) -> bool:
        """Whether the logits after the sequence's last token are used to sample a token."""
        return self.stop - len(self.draft) == len(self.sequence.token_ids)

    def propose(self, draft: array) -> None:
        """Compute tokens as well that may follow the sequence's last one."""
        self.draft = draft
        self.stop += len(draft)
        self.num_logits += len(draft)

    def drop_draft(self) -> None:
        """Compute the sequence's own tokens alone."""
        self.stop -= len(self.draft)
        self.num_logits -= len(self.draft)
        self.draft = ()
