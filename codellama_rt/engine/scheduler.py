"""The scheduler: which tokens the next step computes. Continuous batching over a paged cache.

Decodes first, then prompts in chunks within the token budget, both by (priority, arrival). If a
decode needs a block and none is free, the last sequence in that order loses its blocks and waits to
be recomputed, including the tokens it has generated. So the first sequence always makes progress,
with all blocks to itself if need be, and no deadlock is possible.
"""

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.sequence import Chunk, Sequence

_by_order = attrgetter("order")


@dataclass(slots=True)
class Schedule:
    """One step: what to compute, and the blocks to copy before it."""

    chunks: list[Chunk] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)


class Scheduler:
    """Form steps from sequences; owns their queue and, through the block manager, their blocks.

    Example:
        >>> from codellama_rt.engine.sequence import int32_list
        >>> scheduler = Scheduler(BlockManager(8, 16), max_num_seqs=4, max_num_batched_tokens=32)
        >>> scheduler.add(Sequence(int32_list(range(40)), 40, (0, 0, 0), first_logit=39))
        >>> [(c.start, c.stop, c.num_logits) for c in scheduler.schedule().chunks]
        [(0, 32, 0)]
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int = 512
    ) -> None:
        """Start with nothing queued.

        Args:
            block_manager: of the KV cache that the steps use.
            max_num_seqs: sequences per step.
            max_num_batched_tokens: tokens per step.
        """
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(
                "Scheduler: max_num_seqs and max_num_batched_tokens must be >= 1, "
                f"got {max_num_seqs} and {max_num_batched_tokens}"
            )
        self.blocks = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        # Every running sequence may decode in the same step, so all of them fit the token budget.
        self.max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self.running: list[Sequence] = []  # have blocks; both lists are in order
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def max_computed_tokens(self) -> int:
        """Number of tokens of one sequence that fit the KV cache if it has all blocks."""
        return self.blocks.num_blocks * self.blocks.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ValueError: it can never fit the KV cache, even alone; nothing has changed.
        """
        num_tokens = len(sequence.token_ids)
        if num_tokens > self.max_computed_tokens:
            raise ValueError(
                f"prompt of {num_tokens} tokens is longer than the KV memory: "
                f"{self.blocks.num_blocks} blocks of {self.blocks.block_size} tokens hold "
                f"{self.max_computed_tokens}; shorten the prompt or raise kv_memory"
            )
        insort(self.waiting, sequence, key=_by_order)

    def add_fork(self, parent: Sequence, child: Sequence) -> None:
        """Queue another sample of a running sequence, on the same blocks if it can run now."""
        if len(self.running) < self.max_num_running:
            self.blocks.fork(parent, child)
            insort(self.running, child, key=_by_order)
        else:
            insort(self.waiting, child, key=_by_order)

    def remove(self, sequence: Sequence) -> None:
        """Drop a finished or aborted sequence and free its blocks."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it keeps its place in the queue and is recomputed."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        insort(self.waiting, sequence, key=_by_order)
        self.num_preemptions += 1

    def schedule(self) -> Schedule:
        """Choose the next step's tokens; every chunk has its blocks on return."""
        schedule = Schedule()
        num_preemptions = self.num_preemptions
        self._schedule_decodes(schedule)
        budget = self.max_num_batched_tokens - len(schedule.chunks)
        for sequence in self.running:
            if budget > 0 and sequence.num_uncomputed > 1:
                budget -= self._schedule_chunk(schedule, sequence, budget)
        if self.num_preemptions == num_preemptions:  # else it would take back what was just freed
            self._admit(schedule, budget)
        return schedule

    def commit(self, chunk: Chunk) -> None:
        """Record that a chunk's keys and values are in the cache and its logits delivered."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.stop
        sequence.first_logit = max(sequence.first_logit, chunk.stop)
        self.blocks.index_full_blocks(sequence)

    def _schedule_decodes(self, schedule: Schedule) -> None:
        i = 0
        while i < len(self.running):  # preemption shrinks it at its end
            sequence = self.running[i]
            i += 1
            if sequence.num_uncomputed > 1:
                continue
            while not self.blocks.grow(sequence, 1, schedule.block_copies):
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return
            self._schedule_chunk(schedule, sequence, 1)

    def _admit(self, schedule: Schedule, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_running:
            sequence = self.waiting[0]
            if not self.blocks.allocate(sequence):
                return  # no overtaking: a long prompt must not starve behind short ones
            del self.waiting[0]
            insort(self.running, sequence, key=_by_order)
            budget -= self._schedule_chunk(schedule, sequence, budget)

    @staticmethod
    def _schedule_chunk(schedule: Schedule, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed
        count = min(sequence.num_uncomputed, budget)
        num_logits = max(0, start + count - max(start, sequence.first_logit))
        schedule.chunks.append(Chunk(sequence, start, start + count, num_logits))
        return count
