"""Sequences that a caller extends, forks and drops token by token, on an engine's model and cache.

`Engine` serves requests that end by themselves; this serves searches that look at every row of
logits: beam search, scores, the caller's own criteria. All sequences are computed together.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Collection
from operator import attrgetter
from threading import get_ident

import numpy as np

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.request_checks import checked_prompt
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

        Args:
            engine: its model and cache are used; it may have unfinished requests.
        """
        self._engine = engine
        blocks = engine.scheduler.blocks
        limits = engine.scheduler.max_num_running, engine.scheduler.max_num_batched_tokens
        self._scheduler = Scheduler(blocks, *limits)
        self._numbers = itertools.count()
        self._thread = get_ident()
        self.live: dict[Branch, np.ndarray | None] = {}  # logits; None: queued to be computed
        with engine.owner:
            engine.check_open()
            self._age = next(_ages)
            engine.steps.searches.add(self)

    @property
    def is_computing(self) -> bool:
        """Whether some branches have yet to be computed."""
        return any(logits is None for logits in self.live.values())

    def add(
        self,
        prompt_token_ids: Collection[int],
        adapter: LoraAdapter | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Branch:
        """Start a branch from a prompt.

        Args:
            prompt_token_ids: at least one.
            adapter: applied to all its tokens.
            cache_salt: as of `Engine.add_request`.

        Raises:
            TypeError, ValueError: as `Engine.add_request`.
        """
        token_ids = checked_prompt(prompt_token_ids, self._engine.model.config.vocab_size)
        admission = self._engine.admission
        admission.check_length(len(token_ids))
        self._scheduler.check_length(len(token_ids))
        branch = admission.make_sequence(
            token_ids, (0, 0, next(self._numbers)), adapter, cache_salt
        )
        with self._engine.owner:
            self.live[branch] = None
            self._scheduler.add(branch)
        return branch

    def fork(self, branch: Branch) -> Branch:
        """Return another branch with the same tokens and known logits; blocks are shared."""
        child = branch.fork(next(self._numbers))
        with self._engine.owner:
            self.live[child] = self._known(branch)
            if branch.block_ids:
                self._scheduler.blocks.fork(branch, child)
        return child

    def append(self, branch: Branch, token_id: int) -> None:
        """Extend a branch whose logits are known by one token."""
        with self._engine.owner:
            self._known(branch)
            branch.token_ids.append(token_id)
            self.live[branch] = None
            # Without blocks it has been preempted, and waits.
            queue = self._scheduler.running if branch.block_ids else self._scheduler.waiting
            insort(queue, branch, key=_by_order)

    def drop(self, branch: Branch) -> None:
        """Forget a branch and free its blocks."""
        with self._engine.owner:
            self._drop(branch)

    def logits(self, branches: Collection[Branch]) -> np.ndarray:
        """Return the logits after the last token of each branch.

        Other threads use the engine between the steps that this takes.

        Args:
            branches: live ones; all branches that were extended are computed.

        Returns:
            (len(branches), vocab_size) float32.

        Raises:
            RuntimeError: the engine is closed, or other searches of this thread hold all blocks.
        """
        self._thread = get_ident()
        while self.is_computing:
            with self._engine.owner:
                self._engine.check_open()
                self._step()
        return np.stack([self._known(branch) for branch in branches])

    def give_way(self, *, everything: bool = False) -> bool:
        """Free the blocks of one branch, which is computed again when needed; for the owner only.

        Args:
            everything: also of one that has yet to be computed. Always so in the search's own
                thread, which then is not inside `logits`.

        Returns:
            Whether a branch had any.
        """
        return self._free_last(everything or self._thread == get_ident())

    def recover(self) -> None:
        """Queue what is to be computed, and nothing else, after an exception; for the owner."""
        self._scheduler.recover(branch for branch, logits in self.live.items() if logits is None)

    def __enter__(self) -> Branches:
        """Return the branches themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Drop all branches."""
        with self._engine.owner:
            for branch in list(self.live):
                self._drop(branch)
            self._engine.steps.searches.discard(self)

    def _known(self, branch: Branch) -> np.ndarray:
        logits = self.live[branch]
        assert logits is not None, "the branch has been extended: ask for its logits first"
        return logits

    def _drop(self, branch: Branch) -> None:
        if self.live[branch] is None:
            self._scheduler.remove(branch)
        else:
            self._scheduler.blocks.release(branch)
        del self.live[branch]

    def _step(self) -> None:
        self._engine.steps.copy_blocks()
        chunks = self._scheduler.schedule()
        if not chunks:
            self._make_room()
            return
        self._engine.steps.copy_blocks()
        for chunk, logits in zip(chunks, self._engine.steps.compute(chunks), strict=True):
            branch, is_computed = chunk.sequence, chunk.samples
            last = logits[-1:]
            # No call stands between these lines, so that no exception can.
            if is_computed:
                self.live[branch] = last[0]
            branch.num_computed = chunk.stop

            self._scheduler.blocks.index_blocks(branch)
            if is_computed:
                self._scheduler.running.remove(branch)

    def _make_room(self) -> None:
        """Take blocks: computed branches' of this search, requests', or another search's.

        A search that began earlier and computes in another thread keeps its own: then this one has
        to wait for some turns. So the earliest always makes progress.
        """
        if self._free_last(everything=False):
            return
        requests = self._engine.scheduler
        if requests.running:
            requests.preempt(requests.running[-1])
            return
        others = sorted(self._engine.steps.searches, key=lambda search: -search._age)
        others.remove(self)
        if any(search.give_way(everything=search._age > self._age) for search in others):
            return
        if not any(search.is_computing for search in others):
            raise RuntimeError("the KV cache has no free blocks; raise kv_memory")

    def _free_last(self, everything: bool) -> bool:
        """Free the blocks of the last branch that has any, or of the last computed one."""
        holding = [
            branch
            for branch, logits in self.live.items()
            if branch.block_ids and (everything or logits is not None)
        ]
        if not holding:
            return False
        last = max(holding, key=_by_order)
        if self.live[last] is None:
            self._scheduler.preempt(last)
        else:
            self._scheduler.blocks.release(last)
        return True


_ages = itertools.count()
_by_order = attrgetter("order")
