"""A file with the keys and values of a prefix's blocks, and all that is needed to trust it.

    magic, then 5 little-endian uint32: bytes of `identity`, tokens, first block, number of blocks,
                                        buffers per block
    identity                            JSON object of str: what the bits depend on beside tokens
    tokens                              int32 from the very first to the end of the last block
    checksums                           uint32 CRC-32 of each buffer, block after block
    CRC-32 of all of the above
    the buffers                         block after block; of a block, each layer's keys, its values

Whoever reads compares identity and tokens themselves, so that no two prefixes are ever taken for
one another, whatever a hash in the file's name says. CRC-32 finds every error of one to 32 adjacent
bits, and lets one in 4 billion others pass in each buffer; zlib computes it at 1 to 4 GB/s, several
times as fast as the cryptographic hashes, which would protect no better against accidents.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_MAGIC = b"clrt-kv1"
_SIZES = struct.Struct("<5I")
_CHECKSUM = struct.Struct("<I")
_MAX_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024)  # of one call of the system
_MAX_IDENTITY_BYTES = 2**16

Buffers = Sequence[memoryview]


class PrefixFileError(ValueError):
    """A file is not one with keys and values, or is damaged."""


@dataclass(frozen=True)
class Head:
    """What stands in front of the blocks.

    Attributes:
        identity: as `encode_identity` makes it.
        tokens: int32 in bytes, from the first token to the end of the last block.
        first_block: how many blocks of the prefix come before those in the file.
        checksums: per block, of its buffers.
    """

    identity: bytes
    tokens: bytes
    first_block: int
    checksums: tuple[tuple[int, ...], ...]

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the file."""
        return len(self.checksums)

    def encode(self) -> bytes:
        """Return the head as it is written."""
        flat = [checksum for block in self.checksums for checksum in block]
        sizes = (
            len(self.identity),
            len(self.tokens) // 4,
            self.first_block,
            self.num_blocks,
            len(flat) // self.num_blocks,
        )
        parts = [_MAGIC, _SIZES.pack(*sizes), self.identity, self.tokens]
        parts.append(struct.pack(f"<{len(flat)}I", *flat))
        encoded = b"".join(parts)
        return encoded + _CHECKSUM.pack(zlib.crc32(encoded))


def encode_identity(identity: Mapping[str, str]) -> bytes:
    """Return an identity in the one form that is compared."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()


def decode_identity(encoded: bytes) -> dict[str, str]:
    """Return the identity that a file says it has.

    Raises:
        PrefixFileError: it is none.
    """
    try:
        identity = json.loads(encoded)
    except (ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict) or not all(isinstance(v, str) for v in identity.values()):
        raise PrefixFileError("the identity is not an object of strings")
    return identity


def checksums(buffers: Buffers) -> tuple[int, ...]:
    """Return the CRC-32 of each buffer."""
    return tuple(zlib.crc32(buffer) for buffer in buffers)


def write_file(file: int, head: bytes, blocks: Iterator[Buffers]) -> int:
    """Write an encoded head and blocks to an open file, and return the number of bytes.

    Raises:
        OSError: as the system says.
    """
    written = _write(file, [memoryview(head)])
    return written + sum(_write(file, buffers) for buffers in blocks)


def read_head(file: int) -> tuple[Head, int]:
    """Read and check what is in front of the blocks.

    Returns:
        The head, and where the blocks begin.

    Raises:
        PrefixFileError: the file is none of these, cut, or damaged there.
        OSError: as the system says.
    """
    size = os.fstat(file).st_size
    fixed = len(_MAGIC) + _SIZES.size
    start = os.pread(file, fixed, 0)
    if len(start) < fixed or not start.startswith(_MAGIC):
        raise PrefixFileError("not a file of keys and values of this version")
    num_identity, num_tokens, first_block, num_blocks, num_buffers = _SIZES.unpack(
        start[len(_MAGIC) :]
    )
    num_checksums = num_blocks * num_buffers
    length = fixed + num_identity + 4 * num_tokens + 4 * num_checksums + _CHECKSUM.size
    if length > size or num_identity > _MAX_IDENTITY_BYTES or not num_checksums:
        raise PrefixFileError("its sizes are damaged, or it is cut")
    encoded = os.pread(file, length, 0)
    if len(encoded) < length:
        raise PrefixFileError("it is cut")
    if zlib.crc32(encoded[: -_CHECKSUM.size]) != _CHECKSUM.unpack(encoded[-_CHECKSUM.size :])[0]:
        raise PrefixFileError("its head is damaged")
    tokens_at, checksums_at = fixed + num_identity, fixed + num_identity + 4 * num_tokens
    flat = struct.unpack_from(f"<{num_checksums}I", encoded, checksums_at)
    by_block = tuple(flat[i : i + num_buffers] for i in range(0, num_checksums, num_buffers))
    identity, tokens = encoded[fixed:tokens_at], encoded[tokens_at:checksums_at]
    return Head(identity, tokens, first_block, by_block), length


def check_size(file: int, start: int, num_bytes: int) -> None:
    """Reject a file whose blocks do not take so many bytes from `start` to its end.

    Raises:
        PrefixFileError: it is cut, or something was added.
    """
    if os.fstat(file).st_size != start + num_bytes:
        raise PrefixFileError("it is cut, or holds blocks of another size")


def read_block(file: int, start: int, expected: Sequence[int], buffers: Buffers) -> None:
    """Read one block into its buffers.

    Args:
        file: open.
        start: where the block begins.
        expected: the checksums.
        buffers: written, also if the block is damaged.

    Raises:
        PrefixFileError: the file ends before, or a checksum differs.
        OSError: as the system says.
    """
    for group, offset in _groups(buffers, start):
        _read(file, group, offset)
    if checksums(buffers) != tuple(expected):
        raise PrefixFileError("a block is damaged")


def _read(file: int, buffers: Buffers, offset: int) -> None:
    while buffers:
        count = os.preadv(file, buffers, offset)
        if not count:
            raise PrefixFileError("it is cut")
        offset += count
        buffers = _rest(buffers, count)


def _write(file: int, buffers: Buffers) -> int:
    for group, _ in _groups(buffers, 0):
        while group:
            group = _rest(group, os.writev(file, group))
    return sum(buffer.nbytes for buffer in buffers)


def _groups(buffers: Buffers, offset: int) -> Iterator[tuple[Buffers, int]]:
    """Return as many buffers as one call takes at a time, and where each group begins."""
    for i in range(0, len(buffers), _MAX_BUFFERS):
        group = list(buffers[i : i + _MAX_BUFFERS])
        yield group, offset
        offset += sum(buffer.nbytes for buffer in group)


def _rest(buffers: Buffers, count: int) -> Buffers:
    """Return what is left of buffers after their first `count` bytes."""
    for i, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[i + 1 :]]
        count -= buffer.nbytes
    return []
