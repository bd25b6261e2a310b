"""Zip archives whose members lie uncompressed: a mapped view of each, nothing is ever inflated.

PyTorch stores tensors so. Only the central directory is believed, and only after it was checked:
every member must lie inside the file, in a place of its own, under a plain name that its local
header repeats (APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3.7 to 4.3.16 and 4.5.3).
"""

import struct
from pathlib import Path

import numpy as np

from codellama_rt.errors import CheckpointError

MAX_MEMBERS = 100_000  # a shard of the largest model has under a thousand
MAX_DIRECTORY_BYTES = 2**25
_MAX_COMMENT = 2**16
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_IN_64_BITS = 0xFFFFFFFF
_ENCRYPTED = 1


def read_zip(path: Path, mapped: np.ndarray) -> dict[str, np.ndarray]:
    """Lists the members of an archive.

    Args:
        path: what error messages call it.
        mapped: uint8 (bytes of the file).

    Returns:
        A view of each member's bytes, by name.

    Raises:
        CheckpointError: no zip archive, a damaged one, or one with members that are compressed,
            encrypted, overlapping, there twice, or named like no plain file.
    """
    count, directory = _find_directory(path, mapped)
    entries, at = [], 0
    for _ in range(count):
        name, start, size, at = _read_entry(path, directory, at)
        begin = _content_begin(path, mapped, name, start)
        if begin + size > len(mapped):
            raise _fault(path, f"member {name!r} to lie in the file", "it ends beyond")
        entries.append((start, begin + size, begin, name))
    _check_apart(path, entries)
    return {name: mapped[begin:end] for _, end, begin, name in entries}


def _fault(path: Path, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected}, found {found!s:.200}")


def _find_directory(path: Path, mapped: np.ndarray) -> tuple[int, bytes]:
    """The number of members and the bytes that describe them."""
    tail_begin = max(0, len(mapped) - _MAX_COMMENT - 22)
    tail = mapped[tail_begin:].tobytes()
    at = tail.rfind(_END)
    if at < 0 or at + 22 > len(tail):
        raise _fault(
            path, "a zip archive as torch.save writes it", "no end of one; the file is truncated, "
            "or in the format before torch 1.6"
        )  # fmt: skip
    *_, count, size, begin, _ = struct.unpack_from("<4s4H2LH", tail, at)
    if count == 0xFFFF or _IN_64_BITS in (size, begin):
        count, size, begin = _find_directory64(path, mapped, tail_begin + at)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise _fault(path, f"at most {MAX_MEMBERS} members", f"{count} in {size} bytes")
    if begin + size > len(mapped):
        raise _fault(path, "the list of members to lie in the file", f"it ends at {begin + size}")
    return count, mapped[begin : begin + size].tobytes()


def _find_directory64(path: Path, mapped: np.ndarray, end: int) -> tuple[int, int, int]:
    locator = mapped[max(0, end - 20) : end].tobytes()
    if len(locator) < 20 or not locator.startswith(_LOCATOR64):
        raise _fault(path, "a zip64 locator", locator[:4])
    at = struct.unpack_from("<Q", locator, 8)[0]
    record = mapped[at : at + 56].tobytes() if at < len(mapped) else b""
    if len(record) < 56 or not record.startswith(_END64):
        raise _fault(path, "a zip64 end of the archive", record[:4])
    return struct.unpack_from("<QQQ", record, 32)


def _read_entry(path: Path, directory: bytes, at: int) -> tuple[str, int, int, int]:
    """Name, place of the local header, size, and where the next entry begins."""
    if directory[at : at + 4] != _CENTRAL or at + 46 > len(directory):
        raise _fault(path, "as many members as the archive says", "fewer")
    flags, method = struct.unpack_from("<HH", directory, at + 8)
    packed, size, name_len, extra_len, comment_len = struct.unpack_from("<LL3H", directory, at + 20)
    start = struct.unpack_from("<L", directory, at + 42)[0]
    extra_at = at + 46 + name_len
    name = _plain_name(path, directory[at + 46 : extra_at])
    if flags & _ENCRYPTED or method:
        raise _fault(
            path, f"member {name!r} to be stored as it is",
            "it encrypted" if flags & _ENCRYPTED else f"it compressed (method {method})",
        )  # fmt: skip
    extra = directory[extra_at : extra_at + extra_len]
    size, packed, start = _widen(path, name, extra, [size, packed, start])
    if size != packed:
        raise _fault(path, f"member {name!r} to have one size", f"{size} and {packed}")
    return name, start, size, extra_at + extra_len + comment_len


def _plain_name(path: Path, raw: bytes) -> str:
    try:
        name = raw.decode("ascii")
    except UnicodeDecodeError:
        raise _fault(path, "members with names in ASCII", raw) from None
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
        raise _fault(path, "members with plain names", repr(name))
    return name


def _widen(path: Path, name: str, extra: bytes, numbers: list[int]) -> list[int]:
    """Takes from the zip64 field what 32 bits could not hold."""
    wide = [i for i, number in enumerate(numbers) if number == _IN_64_BITS]
    at = 0
    while wide and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and 8 * len(wide) <= length <= len(extra) - at - 4:
            found = struct.unpack_from(f"<{len(wide)}Q", extra, at + 4)
            for i, number in zip(wide, found, strict=True):
                numbers[i] = number
            return numbers
        at += 4 + length
    if wide:
        raise _fault(path, f"member {name!r} to have its size in 64 bits", "none")
    return numbers


def _content_begin(path: Path, mapped: np.ndarray, name: str, start: int) -> int:
    header = mapped[start : start + 30].tobytes() if start < len(mapped) else b""
    if len(header) < 30 or not header.startswith(_LOCAL):
        raise _fault(path, f"member {name!r} to begin at {start}", "no header there")
    name_len, extra_len = struct.unpack_from("<HH", header, 26)
    if mapped[start + 30 : start + 30 + name_len].tobytes() != name.encode():
        raise _fault(path, f"member {name!r} to be named so in its place, too", "another name")
    return start + 30 + name_len + extra_len


def _check_apart(path: Path, entries: list[tuple[int, int, int, str]]) -> None:
    seen: set[str] = set()
    for *_, name in entries:
        if name in seen:
            raise _fault(path, "every member once", f"{name!r} twice")
        seen.add(name)
    end, previous = 0, ""
    for start, stop, _, name in sorted(entries):
        if start < end:
            raise _fault(path, "members apart from one another", f"{name!r} inside {previous!r}")
        end, previous = stop, name
