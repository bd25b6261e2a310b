"""Reading prefixes from disk into blocks of the KV cache, beside the steps.

A waiting sequence whose turn it is, and whose prefix may be on disk, is held back. Blocks are taken
on behalf of a *reader*: a sequence that only the block manager knows. A thread reads and verifies
one file after another straight into them. What it has read is entered into the prefix cache when a
step begins; then the sequence is admitted as any other, and finds it there.
"""

from __future__ import annotations

import os
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, takewhile
from weakref import WeakSet

from codellama_rt.engine.block_manager import BlockManager
from codellama_rt.engine.disk_cache.store import PrefixStore
from codellama_rt.engine.sequence import Sequence
from codellama_rt.model.kv_cache import KVCache

_PREFETCHED_BYTES = 2**25  # asked of the disk at a time: one file after another leaves it idle
# Threads that read one prefix. One checks about 1 GB/s, and no disk is asked meanwhile.
_NUM_READERS = 4
_PATIENCE_S = 0.05  # that a step with nothing to compute waits, so that requests can be aborted


class Restorer:
    """The prefixes being read; what an engine calls a search.

    Attributes:
        live: readers, which own blocks.
        held: waiting sequences that must not be admitted yet.
        restored_tokens: so far.
    """

    is_computing = False
    _age = -1  # it gives way to every search of branches

    def __init__(
        self,
        store: PrefixStore,
        kv_cache: KVCache,
        blocks: BlockManager,
        identity: Callable[[Sequence], bytes],
    ) -> None:
        """Start with nothing to read; arguments are those of `WriteBehind`."""
        self._store, self._kv_cache, self._blocks = store, kv_cache, blocks
        self._identity = identity
        self.live: dict[Sequence, _Restoration] = {}
        self.held: dict[Sequence, _Restoration] = {}
        self.restored_tokens = 0
        _restorers.add(self)

    def start(self, sequence: Sequence) -> bool:
        """Have what a waiting sequence lacks in memory read, as far as it is on disk.

        Args:
            sequence: one for which there is room.

        Returns:
            Whether there is something to read: then it is in `held` until that is done.
        """
        size, end = self._blocks.block_size, sequence.first_logit
        # The block of the first token to be computed is read for those before it.
        last = min(sequence.num_stored_blocks, -(-end // size))
        if not last:
            return False
        num_cached = self._blocks.num_cached_tokens(sequence)
        if num_cached >= min(last * size, end):
            return False
        first = num_cached // size
        restoration = self._under_way(sequence, first) or self._begin(sequence, first, last)
        if restoration is None:
            return False
        self.held[sequence] = restoration
        return True

    def collect(self) -> None:
        """Enter what has been read into the prefix cache; called when a step begins."""
        for reader, restoration in list(self.live.items()):
            if restoration.is_over():
                self._finish(reader, restoration)

    def wait(self) -> bool:
        """Wait a little for a thread that reads, and return whether there was one."""
        for restoration in self.live.values():
            restoration.join(_PATIENCE_S)
            return True
        return False

    def give_way(self, *, everything: bool = False) -> bool:
        """Break off the last one begun, or all, and free the blocks; whether there was one.

        The thread ends after the file that it is reading. What has been read stays cached.
        """
        readers = list(self.live)[0 if everything else -1 :]
        for reader in readers:
            self.live[reader].stop()
        for reader in readers:
            while not self.live[reader].is_over():
                self.live[reader].join(_PATIENCE_S)
            self._finish(reader, self.live[reader])
        return bool(readers)

    def recover(self) -> None:
        """Hold back no sequence whose reader is gone, after an exception."""
        under_way = list(self.live.values())
        self.held = {one: its for one, its in self.held.items() if its in under_way}

    def _under_way(self, sequence: Sequence, index: int) -> _Restoration | None:
        """Return what is already reading that block of a sequence's prefix, for another one."""
        identity, end = self._identity(sequence), (index + 1) * self._blocks.block_size
        tokens = sequence.token_ids[:end].tobytes()
        for restoration in self.live.values():
            if restoration.reads(identity, tokens, index):
                return restoration
        return None

    def _begin(self, sequence: Sequence, first: int, last: int) -> _Restoration | None:
        size = self._blocks.block_size
        reader = sequence.prefix(last * size)
        reader.first_logit, reader.num_stored_blocks = first * size, last
        identity = self._identity(sequence)
        restoration = _Restoration(self._store, identity, sequence, reader, first)
        self.live[reader] = restoration
        if not self._blocks.allocate(reader, is_request=False):
            del self.live[reader]
            return None
        buffers = self._kv_cache.block_buffers
        restoration.start([buffers(block_id) for block_id in reader.block_ids[first:]])
        return restoration

    def _finish(self, reader: Sequence, restoration: _Restoration) -> None:
        num_read = restoration.num_read
        if reader.block_ids:
            reader.num_computed = (restoration.first + num_read) * self._blocks.block_size
            self._blocks.index_blocks(reader)
            self._blocks.release(reader)
        for sequence, its in list(self.held.items()):
            if its is restoration:
                if sequence is restoration.asker and not restoration.gave_way:
                    sequence.num_stored_blocks = 0  # there is no more
                del self.held[sequence]
        self.restored_tokens += num_read * self._blocks.block_size
        del self.live[reader]


class _Restoration:
    """A thread that reads consecutive blocks of one prefix, with the help of others.

    Attributes:
        asker: the sequence that it began for.
        first: the number of the first block.
        num_read: how many have been read, and are sound.
        gave_way: whether it was broken off.
    """

    def __init__(
        self,
        store: PrefixStore,
        identity: bytes,
        asker: Sequence,
        reader: Sequence,
        first: int,
    ) -> None:
        self.asker, self.first, self.num_read = asker, first, 0
        self.gave_way = False
        self._store, self._identity, self._hashes = store, identity, store.hashes(identity)
        self._tokens, self._last = reader.token_ids.tobytes(), reader.num_stored_blocks
        self._is_started = self._is_reading = self._has_ended = self._is_stopped = False
        self._is_cut = False  # a block was missing
        self._bell = allocate_lock()  # released when the thread ends
        self._bell.acquire()

    def reads(self, identity: bytes, tokens: bytes, index: int) -> bool:
        """Whether it reads block `index`, with which these tokens end."""
        return (
            self.first <= index < self._last
            and identity == self._identity
            and self._tokens.startswith(tokens)
        )

    def start(self, blocks: list[list[memoryview]]) -> None:
        """Read into the memory of these blocks; without a thread, nothing is read."""
        # An interruption may come inside of any Python code; this is one call.
        with suppress(RuntimeError):  # no thread can be started
            start_new_thread(self._run, (blocks,))
            self._is_started = True

    def stop(self) -> None:
        """Have the thread end after the file that it is reading."""
        self.gave_way = self._is_stopped = True

    def is_over(self) -> bool:
        """Whether its thread writes into no block any more."""
        if self._is_started:
            return self._has_ended
        # If an exception has hidden that it was started, it now finds itself stopped, or reads.
        self._is_stopped = True
        return not self._is_reading

    def join(self, timeout: float) -> None:
        """Wait for the thread, at most so many seconds."""
        if not self.is_over():
            self._bell.acquire(timeout=timeout)

    def forget_thread(self) -> None:
        """Be over, as in a forked child, with what was read before."""
        self._is_reading, self._has_ended = False, True

    def _run(self, blocks: list[list[memoryview]]) -> None:
        self._is_reading = True
        try:
            self._read(blocks)
        finally:
            self._is_reading, self._has_ended = False, True
            self._bell.release()

    def _read(self, blocks: list[list[memoryview]]) -> None:
        """Read by several threads, of which this is one."""
        self._hashes.of(self._tokens)  # all of them, before others look
        ahead = max(1, _PREFETCHED_BYTES // sum(buffer.nbytes for buffer in blocks[0]))
        for index in range(self.first, min(self.first + ahead, self._last)):
            self._store.prefetch(self._identity, self._beginning(index), self._hashes)
        are_read, numbers = [False] * len(blocks), count()  # each number goes to one thread
        helpers = []
        for _ in range(min(_NUM_READERS, len(blocks)) - 1):
            helper = allocate_lock()
            helper.acquire()
            with suppress(RuntimeError):  # no thread can be started
                start_new_thread(self._help, (blocks, numbers, are_read, ahead, helper))
                helpers.append(helper)
        self._take(blocks, numbers, are_read, ahead)
        for helper in helpers:
            helper.acquire()
        self.num_read = sum(takewhile(bool, are_read))
        if self.num_read:
            self._store.touch(self._identity, self._beginning(self.first + self.num_read - 1))

    def _help(
        self,
        blocks: list[list[memoryview]],
        numbers: Iterator[int],
        are_read: list[bool],
        ahead: int,
        has_ended: LockType,
    ) -> None:
        try:
            self._take(blocks, numbers, are_read, ahead)
        finally:
            has_ended.release()

    def _take(
        self,
        blocks: list[list[memoryview]],
        numbers: Iterator[int],
        are_read: list[bool],
        ahead: int,
    ) -> None:
        """Read one block after another of those that nobody has taken, until one is missing."""
        for number in numbers:
            if number >= len(blocks) or self._is_stopped or self._is_cut:
                break
            index = self.first + number
            if index + ahead < self._last:
                self._store.prefetch(self._identity, self._beginning(index + ahead), self._hashes)
            tokens = self._beginning(index)
            are_read[number] = self._store.load(
                self._identity, tokens, blocks[number], self._hashes
            )
            self._is_cut |= not are_read[number]

    def _beginning(self, index: int) -> bytes:
        """Return the tokens up to the end of a block."""
        return self._tokens[: (index + 1) * (len(self._tokens) // self._last)]


_restorers: WeakSet[Restorer] = WeakSet()


def _in_child() -> None:
    for restorer in list(_restorers):
        for restoration in restorer.live.values():
            restoration.forget_thread()


os.register_at_fork(after_in_child=_in_child)
