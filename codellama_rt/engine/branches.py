"""Sequences that a caller extends, forks and drops token by token, on an engine's model and cache.

`Engine` serves requests that end by themselves; this serves searches that look at every row of
logits: beam search, scores, the caller's own criteria. All sequences are computed together.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Collection

import numpy as np

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.request import checked_prompt
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Sequence
from codellama_rt.model.lora import LoraAdapter

Branch = Sequence


class Branches:
    """The live sequences of one search; leaving the `with` block frees their cache blocks.

    Example:
        >>> with Branches(llm.engine) as branches:  # doctest: +SKIP
        ...     branch = branches.add([1, 15043])
        ...     [row] = branches.logits([branch])
        ...     branches.append(branch, int(row.argmax()))
    """

    def __init__(self, engine: Engine) -> None:
        """Start with none; shares the prefix cache with the engine's requests.

        engine: its model and cache are used; it may have unfinished requests.
            engine: its model and cache are used; its own requests may be unfinished.
        """
        self._engine = engine
        blocks = engine.scheduler.blocks
        limits = engine.scheduler.max_num_running, engine.scheduler.max_num_batched_tokens
        self._scheduler = Scheduler(blocks, *limits)
        self._rows: dict[Branch, np.ndarray] = {}  # computed ones, hidden from the scheduler
        self._numbers = itertools.count()

    def add(self, prompt_token_ids: Collection[int], adapter: LoraAdapter | None = None) -> Branch:
        """Start a branch from a prompt.

        Args:
            prompt_token_ids: at least one.
            adapter: applied to all its tokens.

        Raises:
            TypeError, ValueError: as `Engine.add_request`.
        """
        token_ids = checked_prompt(prompt_token_ids, self._engine.model.config.vocab_size)
        self._engine.check_length(len(token_ids))
        branch = self._engine.make_sequence(token_ids, (0, 0, next(self._numbers)), adapter)
        self._scheduler.add(branch)
        return branch

    def fork(self, branch: Branch) -> Branch:
        """Return another branch with the same tokens and known logits; blocks are shared."""
        child = branch.fork(next(self._numbers))
        if branch.block_ids:
            self._scheduler.blocks.fork(branch, child)
        self._rows[child] = self._rows[branch]
        return child

    def append(self, branch: Branch, token_id: int) -> None:
        """Extend a branch whose logits are known by one token."""
        del self._rows[branch]
        branch.token_ids.append(token_id)
        waits = not branch.block_ids  # it was preempted
        insort(
            self._scheduler.waiting if waits else self._scheduler.running,
            branch,
            key=lambda other: other.order,
        )

    def drop(self, branch: Branch) -> None:
        """Forget a branch and free its blocks."""
        if self._rows.pop(branch, None) is None:
            self._scheduler.remove(branch)
        else:
            self._scheduler.blocks.release(branch)

    def logits(self, branches: Collection[Branch]) -> np.ndarray:
        """Return the logits after the last token of each branch.

        Args:
            branches: live ones; all branches that were extended are computed.

        Returns:
            (len(branches), vocab_size) float32.

        Raises:
            RuntimeError: other requests hold all blocks.
        """
        while self._scheduler.running or self._scheduler.waiting:
            self._step()
        return np.stack([self._rows[branch] for branch in branches])

    def __enter__(self) -> Branches:
        """Return the branches themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Drop all branches."""
        for branch in [*self._rows, *self._scheduler.running, *self._scheduler.waiting]:
            self.drop(branch)

    def _step(self) -> None:
        schedule = self._scheduler.schedule()
        if not schedule.chunks:
            self._make_room()
            return
        logits = self._engine.compute(schedule)
        end = 0
        for chunk in schedule.chunks:
            end += chunk.num_logits
            self._scheduler.commit(chunk)
            if chunk.samples:
                self._rows[chunk.sequence] = logits[end - 1]
                self._scheduler.running.remove(chunk.sequence)

    def _make_room(self) -> None:
        """Take the blocks of the last computed branch; it is recomputed when extended."""
        holding = [branch for branch in self._rows if branch.block_ids]
        if not holding:
            raise RuntimeError(
                "the KV cache has no free blocks: other requests hold them; end those or raise "
                "kv_memory"
            )
        self._scheduler.blocks.release(max(holding, key=lambda branch: branch.order))
