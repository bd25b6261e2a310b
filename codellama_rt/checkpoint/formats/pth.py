"""Read PyTorch's .pth and .bin files: tensors as views of the mapped archive, without running code.

The archive has `<folder>/data.pkl`, which places each tensor in a storage, and one member
`<folder>/data/<key>` per storage. Members must be stored uncompressed; nothing is ever inflated.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codellama_rt.checkpoint.formats.pth_pickle import (
    MAX_PICKLE_BYTES,
    RefusedPickleError,
    TensorDescription,
    read_tensor_pickle,
)
from codellama_rt.checkpoint.formats.safetensors import ITEM_BYTES
from codellama_rt.checkpoint.stored_tensor import StoredTensor, map_file, stored_tensor
from codellama_rt.errors import CheckpointError, warn_of_checkpoint

# Of the list of members: a shard of the largest model has under a thousand, of 60 bytes each.
MAX_DIRECTORY_BYTES = 2**22
_CHUNK_BYTES = 2**24
_STORED, _ENCRYPTED = zipfile.ZIP_STORED, 1


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """Map a file that torch.save wrote and list its tensors.

    Args:
        path: the file, a dictionary of names and tensors.

    Returns:
        The tensors by name; none has been read.

    Raises:
        CheckpointError: not such an archive, a damaged one, or a pickle that contains anything but
            tensors.
    """
    members = {name: member.content for name, member in _read_zip(path, map_file(path)).items()}
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise _fault(path, "one data.pkl in a folder", len(pickles))
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(folder + "byteorder")
    if order is not None and order[:16].tobytes() != b"little":
        raise _fault(path, "little-endian numbers", "others")
    raw = members[pickles[0]]
    try:
        descriptions = read_tensor_pickle(raw[: MAX_PICKLE_BYTES + 1].tobytes())
    except RefusedPickleError as error:
        raise _fault(path, "a dictionary of tensors", error) from None
    return {
        name: _tensor(path, name, description, members.get(f"{folder}data/{description.storage}"))
        for name, description in descriptions.items()
    }


def verify_pth(path: Path, progress: Callable[[int], None]) -> None:
    """Read a whole file and compare the checksums of its members.

    Args:
        path: a file that `read_pth` opens.
        progress: called with the bytes of each member.

    Raises:
        CheckpointError: the bytes of a member are not those that were written.
    """
    members = _read_zip(path, map_file(path))
    if not any(member.checksum for member in members.values()):
        warn_of_checkpoint(f"{path}: expected checksums, found zeros; its bytes are not verified")
        return
    for name, member in members.items():
        found = _checksum(path, member)
        if found != member.checksum:
            raise _fault(
                path,
                f"member {name!r} to have the CRC-32 {member.checksum:#010x}",
                f"{found:#010x}; the file is damaged",
            )
        progress(member.content.nbytes)


def _checksum(path: Path, member: _Member) -> int:
    """Return the CRC-32 of a member, read and not mapped: mapped pages would stay resident."""
    found, left = 0, member.content.nbytes
    with open(path, "rb") as file:
        file.seek(member.begin)
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            found, left = zlib.crc32(chunk, found), left - len(chunk)
    return found


def _fault(path: Path, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected}, found {found!s:.500}")


def _tensor(path: Path, name: str, said: TensorDescription, storage: Any) -> StoredTensor:
    def fault(expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r:.200}: expected {expected}, found {found}")

    if storage is None:
        raise fault(f"its bytes in data/{said.storage}", "no such member")
    itemsize = ITEM_BYTES[said.encoding]
    if storage.nbytes != said.storage_size * itemsize:
        raise fault(f"a storage of {said.storage_size} {said.encoding}", f"{storage.nbytes} bytes")
    size, stride = math.prod(said.shape), 1
    if not size:
        raise fault("a shape of positive sizes", said.shape)
    for axis, found in zip(reversed(said.shape), reversed(said.strides), strict=True):
        if axis > 1 and found != stride:
            raise fault("its elements one after another", f"strides {said.strides}")
        stride *= axis
    if said.offset + size > said.storage_size:
        raise fault(
            f"elements within its storage of {said.storage_size}",
            f"{said.shape} from {said.offset}",
        )
    payload = storage[said.offset * itemsize : (said.offset + size) * itemsize]
    return stored_tensor(name, path, said.encoding, said.shape, payload)


class _BoundedFile(io.FileIO):
    """A file whose list of members zipfile reads only up to a size: a longer one fills memory."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a list of members of {size} bytes")
        return super().read(size)


class _Member(NamedTuple):
    """The bytes of a member, where they begin, and the CRC-32 that the archive has of them."""

    content: np.ndarray
    begin: int
    checksum: int


def _read_zip(path: Path, mapped: np.ndarray) -> dict[str, _Member]:
    """Return each member by name, its bytes as a view; members do not overlap or are compressed."""
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            entries, comment = archive.infolist(), len(archive.comment)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise _fault(
            path,
            "a zip archive as torch.save writes it",
            f"{error}; the file is truncated, or in the format before torch 1.6",
        ) from None
    count = int.from_bytes(mapped[-comment - 12 :][:2].tobytes(), "little")
    if count not in (len(entries), 0xFFFF):
        raise _fault(path, f"{count} members, as the archive says", len(entries))
    members: dict[str, _Member] = {}
    end, previous = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        _check_member(path, entry)
        if name in members:
            raise _fault(path, "every member once", f"{name!r} twice")
        if entry.header_offset < end:
            raise _fault(path, "members apart from one another", f"{name!r} inside {previous!r}")
        begin = _content_begin(path, mapped, name, entry.header_offset)
        end, previous = begin + entry.file_size, name
        if end > len(mapped):
            raise _fault(path, f"member {name!r} to lie in the file", "it ends beyond")
        members[name] = _Member(mapped[begin:end], begin, entry.CRC)
    return {entry.orig_filename: members[entry.orig_filename] for entry in entries}


def _check_member(path: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    is_plain = name.isascii() and name.isprintable() and "\\" not in name and ":" not in name
    if not is_plain or {"", ".", ".."} & set(name.split("/")):
        raise _fault(path, "members with plain names", repr(name))
    if entry.flag_bits & _ENCRYPTED or entry.compress_type != _STORED:
        how = "encrypted" if entry.flag_bits & _ENCRYPTED else "compressed"
        raise _fault(path, f"member {name!r} to be stored as it is", f"it {how}")
    if entry.file_size != entry.compress_size:
        sizes = f"{entry.file_size} and {entry.compress_size}"
        raise _fault(path, f"member {name!r} to have one size", sizes)


def _content_begin(path: Path, mapped: np.ndarray, name: str, start: int) -> int:
    """Return where the bytes begin after the local header (APPNOTE.TXT of PKWARE, 4.3.7)."""
    header = mapped[start : start + 30].tobytes() if start < len(mapped) else b""
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise _fault(path, f"member {name!r} to begin at {start}", "no header there")
    name_len, extra_len = struct.unpack_from("<HH", header, 26)
    if mapped[start + 30 : start + 30 + name_len].tobytes() != name.encode():
        raise _fault(path, f"member {name!r} to be named so in its place, too", "another name")
    return start + 30 + name_len + extra_len
