"""The scheduler: which tokens the next step computes. Continuous batching over a paged cache.

Decodes first, then prompts in chunks, which share the rest of the token budget: by priority, then
the one with the fewest tokens left first, so that a short prompt does not wait for a long one. The
prompt that came first has a part of the budget to itself, so that it does not wait for ever either.

With a `StepCost` the budget is one of seconds as well. Nothing that is computed depends on it, only
when: a token's bits are the same in any chunk.

If a decode needs a block and none is free, the last sequence in the order of (priority, arrival)
loses its blocks and waits to be recomputed, including the tokens it has generated. So the first
sequence always makes progress, with all blocks to itself if need be, and no deadlock is possible.
So do sequences of less priority than one that waits and would then fit.
"""

import math
from array import array
from bisect import insort
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.sequence import Chunk, Sequence
from codellama_rt.engine.step_cost import StepCost

_by_order = attrgetter("order")
_OLDEST_SHARE = 8  # the oldest prompt gets at least one token in so many of those for prompts
# Prompts beside decodes make a step at most three times as long: two thirds of it are theirs, so
# they run at about that part of their speed, since each step reads the weights for both.
_MOST_SLOWDOWN = 3
# However short a step is to be, prompts beside decodes have so much of what these take alone. (7B
# at a depth of 8,000, steps of a second: they run at 61 to 64 % of their speed, and a stream's
# tokens are 2.2 to 2.3 times as long apart.)
_LEAST_SHARE = 1.7
_FIXED_SHARE = 10  # a prompt that is alone gives at most a tenth of its time to reading weights


class PrefixReader(Protocol):
    """What reads prefixes from disk: `Restorer`.

    Attributes:
        held: waiting sequences that must not be admitted, as theirs are being read.
    """

    held: Container[Sequence]

    def start(self, sequence: Sequence) -> bool:
        """Begin to read a waiting sequence's prefix, and return whether there is one to read."""

    def collect(self) -> None:
        """Enter what has been read into the prefix cache."""

    def wait(self) -> bool:
        """Wait a little for what is being read, and return whether there was anything."""

    def give_way(self) -> bool:
        """Free blocks that are being read into, and return whether there were any."""


@dataclass(slots=True)
class Budget:
    """What prompts may take of a step.

    Args:
        tokens: at most so many.
        seconds: at most so long, by `cost`.
        cost: None: `seconds` is infinite.
    """

    tokens: int
    seconds: float = math.inf
    cost: StepCost | None = None

    def share(self, parts: int, most: int) -> "Budget":
        """Return one of so many parts, at least one token of it and `most` tokens at most."""
        seconds = 0.0 if self.cost is None else self.seconds / parts
        return Budget(min(most, max(1, self.tokens // parts)), seconds)

    def is_spent(self, kept: "Budget") -> bool:
        """Whether nothing is left beside what is kept for another sequence."""
        return self.tokens <= kept.tokens or self.seconds <= kept.seconds

    def take(self, sequence: Sequence, kept: "Budget") -> Chunk:
        """Return the sequence's next tokens that fit beside what is kept, and count them."""
        tokens = self.tokens - kept.tokens
        if self.cost is None:
            chunk = _chunk(sequence, tokens)
        else:
            seconds = self.seconds - kept.seconds
            chunk = _chunk(
                sequence, min(tokens, self.cost.num_tokens(seconds, sequence.num_computed))
            )
            self.seconds -= self.cost.seconds([chunk]) - self.cost.fixed
        self.tokens -= chunk.stop - chunk.start
        return chunk


_NOTHING = Budget(0, 0.0)
# Of the sequences that decode, and at most so many tokens in all: those of each, maybe none.
Propose = Callable[[list[Sequence], int], list[array]]


class Scheduler:
    """Form steps from sequences; owns their queue and, through the block manager, their blocks.

    Example:
        >>> from codellama_rt.engine.sequence import int32_list
        >>> scheduler = Scheduler(BlockManager(8, 16), max_num_seqs=4, max_num_batched_tokens=32)
        >>> scheduler.add(Sequence(int32_list(range(40)), 40, (0, 0, 0), first_logit=39))
        >>> [(c.start, c.stop, c.num_logits) for c in scheduler.schedule()]
        [(0, 32, 0)]
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int = 512,
        *,
        max_step_seconds: float = math.inf,
        cost: StepCost | None = None,
    ) -> None:
        """Start with nothing queued.

        Args:
            block_manager: of the KV cache that the steps use.
            max_num_seqs: sequences per step.
            max_num_batched_tokens: tokens per step.
            max_step_seconds: of steps with prompts, by `cost`; see `prompt_seconds`.
            cost: learns from the steps; None: their time is not bounded.
        """
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(
                "Scheduler: max_num_seqs and max_num_batched_tokens must be >= 1, "
                f"got {max_num_seqs} and {max_num_batched_tokens}"
            )
        self.blocks = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_step_seconds = max_step_seconds
        self.cost = cost
        # Every running sequence may decode in the same step, so all of them fit the token budget.
        self.max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self.running: list[Sequence] = []  # have blocks; both lists are in order
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._repeated: list[Chunk] = []  # what the next step computes, one token further
        self.propose: Propose | None = None  # tokens for decodes to compute besides
        self.prefix_reader: PrefixReader | None = None

    def backlog_seconds(self) -> float | None:
        """Return how long the pending tokens take in full steps, or None if that is unknown."""
        if self.cost is None:
            return None
        seconds = 0.0
        for one in (*self.running, *self.waiting):
            if one.num_uncomputed > 1:
                chunk = _chunk(one, one.num_uncomputed)
                seconds += self.cost.seconds([chunk]) - self.cost.fixed
        return seconds + self.cost.fixed * self.num_pending_tokens / self.max_num_batched_tokens

    @property
    def max_computed_tokens(self) -> int:
        """Number of tokens of one sequence that fit the KV cache if it has all blocks."""
        return self.blocks.num_blocks * self.blocks.block_size

    def check_length(self, num_tokens: int) -> None:
        """Raise ValueError if a prompt can never fit the KV cache, even alone."""
        if num_tokens > self.max_computed_tokens:
            raise ValueError(
                f"prompt of {num_tokens} tokens is longer than the KV memory: "
                f"{self.blocks.num_blocks} blocks of {self.blocks.block_size} tokens hold "
                f"{self.max_computed_tokens}; shorten the prompt or raise kv_memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ValueError: it can never fit the KV cache, even alone; nothing has changed.
        """
        self.check_length(len(sequence.token_ids))
        self._repeated = []
        insort(self.waiting, sequence, key=_by_order)

    def add_fork(self, parent: Sequence, child: Sequence) -> None:
        """Queue another sample of a running sequence, on the same blocks if it can run now."""
        self._repeated = []
        if len(self.running) < self.max_num_running:
            self.blocks.fork(parent, child)
            insort(self.running, child, key=_by_order)
        else:
            insort(self.waiting, child, key=_by_order)

    def remove(self, sequence: Sequence) -> None:
        """Drop a finished or aborted sequence and free its blocks."""
        self._repeated = []
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it keeps its place in the queue and is recomputed."""
        self._repeated = []
        self.running.remove(sequence)
        sequence.num_stored_blocks = sequence.num_indexed_blocks
        self.blocks.release(sequence)
        insort(self.waiting, sequence, key=_by_order)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def schedule(self) -> list[Chunk]:
        """Choose the next step's tokens; every chunk has its blocks on return.

        Blocks in `blocks.copies` must be copied before the chunks are computed.
        """
        repeated, self._repeated = self._repeated, []
        if repeated and self._can_repeat(repeated):
            return repeated
        chunks: list[Chunk] = []
        if self.prefix_reader is not None:
            self.prefix_reader.collect()
        self._make_room_for_first()
        num_preemptions = self.num_preemptions
        self._schedule_decodes(chunks)
        has_others = len(chunks) < len(self.running) + len(self.waiting)
        num_tokens = len(chunks)
        if self.propose is not None and chunks:
            num_tokens += self._add_drafts(chunks, has_others)
        # A sequence admitted after a preemption would take back what was just freed.
        may_admit = self.num_preemptions == num_preemptions
        if has_others:
            budget = Budget(self.max_num_batched_tokens - num_tokens)
            if self.cost is not None:
                budget.seconds, budget.cost = self.prompt_seconds(chunks), self.cost
            self._schedule_prompts(chunks, budget, may_admit)
        return chunks

    def repeat(self, decodes: list[Chunk]) -> None:
        """Compute the next tokens of the same sequences in the next step, if nothing comes between.

        Args:
            decodes: of the last `schedule`, one token each, and each has gained one.
        """
        is_all = len(decodes) == len(self.running) and not self.waiting
        if is_all and self.propose is None and self.prefix_reader is None:
            self._repeated = decodes

    def prompt_seconds(self, decodes: list[Chunk]) -> float:
        """Return how long the prompts of a step may take beside these decodes.

        Beside decodes, as long as keeps the step below `max_step_seconds` and below three times
        what the decodes take alone; but no less than 1.7 times those, or prompts would run at half
        of their speed in a model whose single step takes about that long. A prompt that is alone is
        computed in steps as long as reading the weights is a tenth of them; with others waiting, no
        less than two thirds.
        """
        if decodes:
            quiet = self.cost.seconds(decodes)
            most = (_MOST_SLOWDOWN - 1) * quiet
            return min(most, max(_LEAST_SHARE * quiet, self.max_step_seconds - quiet))
        fixed = self.cost.fixed
        is_alone = len(self.running) + len(self.waiting) == 1
        least = (_FIXED_SHARE if is_alone else _MOST_SLOWDOWN) - 1
        return max(least * fixed, self.max_step_seconds - fixed)

    @property
    def num_pending_tokens(self) -> int:
        """Number of prompt tokens yet to be computed, those that were preempted included."""
        counts = [sequence.num_uncomputed for sequence in (*self.running, *self.waiting)]
        return sum(count for count in counts if count > 1)

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """Queue these sequences and no others, after an exception; those with blocks run on."""
        self._repeated = []
        ordered = sorted(sequences, key=_by_order)
        self.running = [sequence for sequence in ordered if sequence.block_ids]
        self.waiting = [sequence for sequence in ordered if not sequence.block_ids]

    def _can_repeat(self, decodes: list[Chunk]) -> bool:
        """Go on to the next tokens; return False where blocks are missing."""
        for chunk in decodes:
            start, sequence = chunk.stop, chunk.sequence
            if start >= sequence.num_writable and not self.blocks.grow(sequence, 1):
                return False
            chunk.start, chunk.stop = start, start + 1
        return True

    def _schedule_decodes(self, chunks: list[Chunk]) -> None:
        for sequence in self.running:  # preemption shrinks it at its end
            start = sequence.num_computed
            if len(sequence.token_ids) > start + 1:
                continue
            while start >= sequence.num_writable and not self.blocks.grow(sequence, 1):
                if self.prefix_reader is not None and self.prefix_reader.give_way():
                    continue
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return
            chunks.append(Chunk(sequence, start, start + 1, 1))

    def _add_drafts(self, chunks: list[Chunk], has_others: bool) -> int:
        """Add proposed tokens to decodes, as far as there is room; return how many.

        They take no block that a running sequence may need next, and leave half of the tokens to
        prompts.
        """
        most = (self.max_num_batched_tokens - len(chunks)) // (2 if has_others else 1)
        added = 0
        for chunk, draft in zip(
            chunks, self.propose([c.sequence for c in chunks], most), strict=True
        ):
            if not draft or self.blocks.num_free <= len(self.running):
                continue
            if self.blocks.grow(chunk.sequence, 1 + len(draft)):
                chunk.propose(draft)
                added += len(draft)
        return added

    def _make_room_for_first(self) -> None:
        """Preempt sequences of less priority than the first that waits, if it then can run."""
        waiting = self._admissible()
        if not waiting:
            return
        first = waiting[0]
        lower = [one for one in self.running if one.order[0] > first.order[0]]
        while lower:
            needed = self.blocks.num_needed(first)
            has_place = len(self.running) < self.max_num_running
            if has_place and needed <= self.blocks.num_free:
                return
            if needed > self.blocks.num_free + sum(len(one.block_ids) for one in lower):
                return
            self.preempt(lower.pop())

    def _schedule_prompts(self, chunks: list[Chunk], budget: Budget, may_admit: bool) -> None:
        prompts = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        queue, kept = [], 0
        if may_admit and self.waiting and len(self.running) < self.max_num_running:
            queue = self._admissible()
            kept = self.blocks.num_needed(queue[0]) if queue else 0
            if kept > self.blocks.num_free:
                queue = []
        if not prompts and not queue:
            return
        oldest = min([*prompts, *queue[:1]], key=_by_arrival)
        reserved = budget.share(_OLDEST_SHARE, oldest.num_uncomputed)
        for sequence in sorted([*prompts, *queue], key=_by_urgency):
            if sequence is oldest:
                reserved = _NOTHING
            if budget.is_spent(reserved):
                continue
            if not sequence.block_ids:
                if not self._admit(sequence, 0 if sequence is queue[0] else kept):
                    continue
                kept = 0 if queue[0].block_ids else self.blocks.num_needed(queue[0])
            chunks.append(budget.take(sequence, reserved))

    def _admissible(self) -> list[Sequence]:
        """Return the waiting sequences but those whose prefixes are being read."""
        if self.prefix_reader is None:
            return self.waiting[:]
        return [one for one in self.waiting if one not in self.prefix_reader.held]

    def _admit(self, sequence: Sequence, kept: int) -> bool:
        """Let a waiting sequence run if there is room, and nothing of it to read from disk first.

        Args:
            sequence: one that waits.
            kept: blocks that the first in the queue needs, if it is another one and still waits. It
                keeps these and a place, or it would starve behind short ones that take each as it
                becomes free.
        """
        places = 2 if kept else 1
        if len(self.running) + places > self.max_num_running:
            return False
        if self.blocks.num_needed(sequence) + kept > self.blocks.num_free:
            return False
        if self.prefix_reader is not None and self.prefix_reader.start(sequence):
            return False
        self.blocks.allocate(sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_by_order)
        return True


def _by_arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.order[1:]


def _by_urgency(sequence: Sequence) -> tuple[int, int, tuple[int, int]]:
    return sequence.order[0], sequence.num_uncomputed, sequence.order[1:]


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    """Return the sequence's next tokens, at most `budget` of them."""
    start = sequence.num_computed
    stop = start + min(sequence.num_uncomputed, budget)
    return Chunk(sequence, start, stop, max(0, stop - max(start, sequence.first_logit)))
