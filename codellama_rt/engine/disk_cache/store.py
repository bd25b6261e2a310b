"""A folder of prefix files, one block each, that any number of processes use at the same time.

A file's name is made of two hashes: of the prefix up to the block, and of the one that ends with
it. So the names alone are a tree, and what is thrown away first can be told from a listing: the
ends of the prefixes that nothing has continued, or read, for the longest time.

Nothing is ever locked for others, and no state is kept but the files:

* A file is written under another name and renamed when it is complete. Who writes holds a lock of
  the system on it, so that what a killed process left is known by being unlocked, and deleted.
* Nothing is flushed to the disk: what a failing machine loses or tears is found by size and
  checksums when it is read, and computed again.
* A file that is read may be deleted meanwhile: the reader has it open.
* Every error means that a block is not stored, or not found. They are counted, and the first one is
  logged.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic
from typing import NamedTuple

from codellama_rt.engine.disk_cache.block_file import (
    Buffers,
    Head,
    PrefixFileError,
    check_size,
    checksums,
    read_block,
    read_head,
    write_file,
)

logger = logging.getLogger(__name__)
_HASH_BYTES = 16
_NAME = re.compile(rf"([0-9a-f]{{{2 * _HASH_BYTES}}})-([0-9a-f]{{{2 * _HASH_BYTES}}})\.kv")
_UNFINISHED = ".kv-unfinished"
_PAUSE_S = 10.0  # without writing after an error: a full disk is not asked again for every block
_LOOKS = 32  # the folder is listed after each such part of the budget, as others may write there
_ADVISED_BYTES = 2**17  # Linux reads no more for one call than the device's usual read-ahead
_TOKEN_BYTES = 4


class _File(NamedTuple):
    path: str
    parent: str
    num_bytes: int
    used: int  # when it was written or last read, nanoseconds


class PrefixHashes:
    """The hashes of a growing prefix, each block of which is hashed once.

    Example:
        >>> hashes = PrefixHashes(b"model", block_bytes=8)
        >>> parent, own = hashes.of(bytes(16))
        >>> hashes.of(bytes(8))[1] == parent
        True
    """

    def __init__(self, identity: bytes, block_bytes: int) -> None:
        """Start with the empty prefix.

        Args:
            identity: what the blocks depend on beside the tokens.
            block_bytes: of the tokens of a block.
        """
        self._block_bytes = block_bytes
        self._hasher = _new_hasher(identity)
        self._names = [self._hasher.hexdigest()]

    def of(self, tokens: bytes) -> tuple[str, str]:
        """Return the hashes of a prefix without its last block, and with it.

        Args:
            tokens: int32 of whole blocks; they begin, or go on, as those of every call before.
        """
        size, names = self._block_bytes, self._names
        count = len(tokens) // size
        for index in range(len(names) - 1, count):
            self._hasher.update(tokens[index * size : (index + 1) * size])
            names.append(self._hasher.hexdigest())
        return names[count - 1], names[count]


class PrefixStore:
    """Keep blocks of keys and values on disk, within a budget of bytes.

    Attributes:
        written_bytes: by this object, so far.
        num_errors: of the system, and damaged files.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = PrefixStore(folder.name, 10**6, {}, block_size=16)
        >>> identity, tokens, block = b"model", bytes(64), memoryview(bytearray(b"kv"))
        >>> store.save(identity, tokens, [block], lambda: True)
        >>> store.num_stored(identity, tokens * 2)
        1
        >>> found = memoryview(bytearray(2))
        >>> store.load(identity, tokens, [found]), bytes(found)
        (True, b'kv')
        >>> folder.cleanup()
    """

    def __init__(
        self, folder: str, max_bytes: int, model: Mapping[str, str], *, block_size: int
    ) -> None:
        """Make the folder if need be; nobody else may read it then.

        Args:
            folder: where the files are; others in it are left alone.
            max_bytes: that all prefix files in the folder may take, also those of other models.
            model: what the bits of its keys and values depend on; for whoever makes identities.
            block_size: tokens per block.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.model = dict(model)
        self._block_bytes = block_size * _TOKEN_BYTES
        self.written_bytes = self.num_errors = 0
        self._paused_until = 0.0
        self._known_bytes = self._bytes_since_look = max_bytes  # look before the first write
        with self._counting_errors():
            os.makedirs(folder, mode=0o700, exist_ok=True)

    def num_stored(self, identity: bytes, tokens: bytes) -> int:
        """Return how many leading blocks of a prefix seem to be stored; none is read.

        Args:
            identity: what its bits depend on beside the tokens.
            tokens: int32 from the very first on.
        """
        count, hashes = 0, self.hashes(identity)
        for end in range(self._block_bytes, len(tokens) + 1, self._block_bytes):
            if not os.path.exists(self._path_of(tokens[:end], hashes)):
                break
            count += 1
        return count

    def hashes(self, identity: bytes) -> PrefixHashes:
        """Return what knows the hashes of one prefix, for the calls that are about it."""
        return PrefixHashes(identity, self._block_bytes)

    def prefetch(self, identity: bytes, tokens: bytes, hashes: PrefixHashes | None = None) -> None:
        """Have the system read a block from the disk meanwhile, as `load` will ask for it.

        Args:
            identity: what its bits depend on beside the tokens.
            tokens: int32 from the very first to the end of the block.
            hashes: of this prefix, where several of its blocks are asked for.
        """
        path = self._path_of(tokens, hashes or self.hashes(identity))
        with suppress(OSError):  # `load` will tell
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                for start in range(0, os.fstat(file).st_size, _ADVISED_BYTES):
                    os.posix_fadvise(file, start, _ADVISED_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def load(
        self,
        identity: bytes,
        tokens: bytes,
        buffers: Buffers,
        hashes: PrefixHashes | None = None,
    ) -> bool:
        """Read a block into its buffers, and return whether it was there and is sound.

        Args:
            identity: what its bits depend on beside the tokens.
            tokens: int32 from the very first to the end of the block.
            buffers: written, also if the block turns out to be damaged.
            hashes: as for `prefetch`.
        """
        path = self._path_of(tokens, hashes or self.hashes(identity))
        with self._counting_errors(), self._deleting_if_damaged(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                return self._read(file, identity, tokens, buffers)
            except OSError as error:  # a bad sector
                raise PrefixFileError(str(error)) from None
            finally:
                os.close(file)
        return False

    def touch(self, identity: bytes, tokens: bytes) -> None:
        """Note that the prefix has been used, so that it is kept longer."""
        with suppress(OSError):  # a folder that may only be read
            os.utime(self._path_of(tokens, self.hashes(identity)))

    def save(
        self,
        identity: bytes,
        tokens: bytes,
        buffers: Buffers,
        is_valid: Callable[[], bool],
        hashes: PrefixHashes | None = None,
    ) -> None:
        """Write a block, unless it is stored already.

        Args:
            identity: what its bits depend on beside the tokens.
            tokens: int32 from the very first to the end of the block.
            buffers: the block's memory, which others may be about to use for something else.
            is_valid: asked when all of it has been read: whether nobody has.
            hashes: as for `prefetch`.
        """
        path = self._path_of(tokens, hashes or self.hashes(identity))
        if monotonic() < self._paused_until or os.path.exists(path):
            return
        index = len(tokens) // self._block_bytes - 1
        head = Head(identity, tokens, index, (checksums(buffers),)).encode()
        with self._counting_errors(pausing=True):
            if self._make_room(len(head) + sum(buffer.nbytes for buffer in buffers)):
                self._write(path, head, buffers, is_valid)

    def _read(self, file: int, identity: bytes, tokens: bytes, buffers: Buffers) -> bool:
        head, start = read_head(file)
        index = len(tokens) // self._block_bytes - 1
        if (head.identity, head.tokens, head.first_block) != (identity, tokens, index):
            return False  # another prefix whose hash is the same
        if head.num_blocks != 1 or len(head.checksums[0]) != len(buffers):
            raise PrefixFileError("it does not hold one block of this model")
        check_size(file, start, sum(buffer.nbytes for buffer in buffers))
        read_block(file, start, head.checksums[0], buffers)
        return True

    def _write(
        self, path: str, head: bytes, buffers: Buffers, is_valid: Callable[[], bool]
    ) -> None:
        unfinished = os.path.join(self.folder, secrets.token_hex(8) + _UNFINISHED)
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _lock(file)
            count = write_file(file, head, iter([buffers]))
            if is_valid():
                os.rename(unfinished, path)
                self.written_bytes += count
        finally:
            with suppress(OSError):  # it has its other name now, or another process was faster
                os.unlink(unfinished)
            os.close(file)

    def _make_room(self, num_bytes: int) -> bool:
        """Delete what has not been used for longest until so many bytes fit; whether they do."""
        self._known_bytes += num_bytes
        self._bytes_since_look += num_bytes
        if self._known_bytes <= self.max_bytes and self._bytes_since_look * _LOOKS < self.max_bytes:
            return True
        files, total = self._look()
        for file in _least_used_first(files):
            if total + num_bytes <= self.max_bytes:
                break
            with suppress(FileNotFoundError):  # another process was faster
                os.unlink(file.path)
            total -= file.num_bytes
        self._known_bytes, self._bytes_since_look = total + num_bytes, num_bytes
        return self._known_bytes <= self.max_bytes

    def _look(self) -> tuple[dict[str, _File], int]:
        """Return the files by their hashes, and the bytes of all; delete what nobody finishes."""
        files, total = {}, 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                is_unfinished = entry.name.endswith(_UNFINISHED)
                if not match and not is_unfinished:
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if match:
                        parent, name = match.groups()
                        files[name] = _File(entry.path, parent, status.st_size, status.st_mtime_ns)
                    elif _delete_if_left(entry.path):
                        continue
                    total += status.st_size
        return files, total

    def _path_of(self, tokens: bytes, hashes: PrefixHashes) -> str:
        parent, name = hashes.of(tokens)
        return os.path.join(self.folder, f"{parent}-{name}.kv")

    @contextmanager
    def _counting_errors(self, *, pausing: bool = False) -> Iterator[None]:
        try:
            yield
        except (OSError, PrefixFileError) as error:
            if pausing:
                self._paused_until = monotonic() + _PAUSE_S
            if not self.num_errors:
                logger.warning(
                    "the prefix cache in %s had an error, what it lacks is computed: %s; "
                    "further errors are only counted",
                    self.folder,
                    error,
                )
            self.num_errors += 1

    @contextmanager
    def _deleting_if_damaged(self, path: str) -> Iterator[None]:
        try:
            yield
        except PrefixFileError as error:
            with suppress(OSError):
                os.unlink(path)
            raise PrefixFileError(f"{path}: {error}") from None


def _new_hasher(identity: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(identity, digest_size=_HASH_BYTES)


def _least_used_first(files: Mapping[str, _File]) -> Iterator[_File]:
    """Return files so that one comes after all that continue it.

    A prefix is used whenever one is that continues it.
    """
    kept, seen = [], set()
    for name in sorted(files, key=lambda name: -files[name].used):
        line = []
        while name in files and name not in seen:
            seen.add(name)
            line.append(files[name])
            name = files[name].parent
        kept += reversed(line)
    return reversed(kept)


def _lock(file: int) -> bool:
    """Lock an open file for as long as it is open; return whether it was free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _delete_if_left(path: str) -> bool:
    """Delete an unfinished file that no process is writing, and return whether it is gone."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _lock(file):
            return False
        with suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(file)
