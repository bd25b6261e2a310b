"""Writing the prefix cache to disk behind the steps, in a thread of its own."""

from __future__ import annotations

import atexit
import os
from _thread import allocate_lock, start_new_thread
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import sleep
from typing import NamedTuple
from weakref import WeakSet

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.disk_cache.store import PrefixHashes, PrefixStore
from codellama_rt.engine.sequence import Sequence
from codellama_rt.model.kv_cache import KVCache

_POLL_S = 0.005
_KEPT_HASHES = 64  # of as many sequences that fill blocks in turn


class WriteBehind:
    """Write each block that is entered into the prefix cache, if it is still there in time.

    Blocks are written from where they are: nothing is copied, and nobody has to wait. A block whose
    memory was given to another sequence before it was written, or meanwhile, is not stored. So the
    queue is bounded by the number of blocks in the cache and holds no memory.
    """

    def __init__(
        self,
        store: PrefixStore,
        kv_cache: KVCache,
        blocks: BlockManager,
        identity: Callable[[Sequence], bytes],
    ) -> None:
        """Start with nothing to write; a thread runs only while there is something.

        Args:
            store: where to.
            kv_cache: holds the blocks.
            blocks: says what is in them.
            identity: of a sequence, as the store knows it.
        """
        self._store, self._kv_cache, self._blocks = store, kv_cache, blocks
        self._identity = identity
        self.num_dropped = 0  # blocks that were used for something else before they were written
        self._is_closed = False
        self.forget_thread()
        _writers.add(self)

    def offer(self, sequence: Sequence, index: int, prefix: object) -> None:
        """Take note that a sequence's block has been entered; called in the step.

        Args:
            sequence: in whose table it is.
            index: its place there.
            prefix: that it holds, as `BlockManager.holds` takes it.
        """
        if index < sequence.num_stored_blocks or self._is_closed:
            return
        if len(self._queue) == self._queue.maxlen:
            self.num_dropped += 1  # the oldest
        block_id, identity = sequence.block_ids[index], self._identity(sequence)
        self._queue.append(_Entry(identity, sequence.token_ids, index, block_id, prefix))
        if not self._is_busy.locked():
            with suppress(RuntimeError):  # no thread can be started: the next block tries again
                start_new_thread(self._work, ())

    def flush(self) -> None:
        """Return when all blocks offered so far are written, or dropped."""
        while self._queue or self._is_busy.locked():
            if not self._is_busy.locked():
                try:
                    start_new_thread(self._work, ())
                except RuntimeError:  # none can be started, as when the interpreter ends
                    self._work()
            sleep(_POLL_S)

    def close(self) -> None:
        """Write what was offered so far, and nothing more."""
        self._is_closed = True
        self.flush()

    def _work(self) -> None:
        """Write what is in the queue, unless another thread does."""
        # What is offered while the lock is held is seen here; what comes later starts a thread.
        while self._queue and self._is_busy.acquire(blocking=False):
            try:
                while self._queue:
                    self._write(self._queue.popleft())
            finally:
                self._is_busy.release()

    def _write(self, entry: _Entry) -> None:
        def is_valid() -> bool:
            return self._blocks.holds(entry.block_id, entry.prefix)

        if not is_valid():
            self.num_dropped += 1
            return
        end = (entry.index + 1) * self._blocks.block_size
        self._store.save(
            entry.identity,
            entry.token_ids[:end].tobytes(),
            self._kv_cache.block_buffers(entry.block_id),
            is_valid,
            self._hashes_of(entry),
        )

    def _hashes_of(self, entry: _Entry) -> PrefixHashes:
        """Return those of the entry's sequence, of which most blocks come one after another."""
        key = id(entry.token_ids)  # of a list that is kept here
        known = self._hashes.pop(key, None)
        if known is None or known[1] != entry.identity:
            known = entry.token_ids, entry.identity, self._store.hashes(entry.identity)
        self._hashes[key] = known
        if len(self._hashes) > _KEPT_HASHES:
            del self._hashes[next(iter(self._hashes))]
        return known[2]

    def forget_thread(self) -> None:
        """Start anew with no thread and an empty queue, as a forked child does."""
        # An interruption of a step may come inside of any Python code; each of these is one call.
        self._is_busy = allocate_lock()  # held by who writes
        self._queue: deque[_Entry] = deque(maxlen=self._blocks.num_blocks)
        self._hashes: dict[int, tuple[array, bytes, PrefixHashes]] = {}  # latest last


class _Entry(NamedTuple):
    identity: bytes
    token_ids: array  # only appended to, behind the block
    index: int
    block_id: int
    prefix: object


_writers: WeakSet[WriteBehind] = WeakSet()


def _in_child() -> None:
    for writer in list(_writers):
        writer.forget_thread()


def _at_exit() -> None:
    """Write what an engine has computed that nobody closed."""
    for writer in list(_writers):
        writer.flush()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
