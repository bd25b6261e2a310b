"""Write .pth files for torch.load (weights_only or not) and `read_pth`: a dictionary of tensors.

Each tensor has its own storage, uncompressed and aligned to 64 bytes.
"""

import itertools
import struct
import zlib
from collections.abc import Sequence

from codellama_rt.checkpoint.formats.tensor_file import Entry
from codellama_rt.ops.dtypes import ENCODINGS, FLOATS

_STORAGES = {known.encoding: known.storage for known in FLOATS.values()}
_ALIGNMENT = 64
_PADDING_FIELD = 0x4246  # "FB", as torch marks it
_LARGE = 0xFFFFFFFF  # sizes and offsets from here on need 64 bits
_IN_64_BITS = 0xFFFFFFFF  # the 32-bit field's value then
_DOS_DATE = 0x21  # 1 January 1980: the same bytes whenever they are written


class PthLayout:
    """The tensors of a .pth file."""

    def __init__(self, entries: Sequence[Entry], folder: str) -> None:
        """Lay out the tensors; `folder` contains the members, by convention the file's stem."""
        self.entries, self._folder = entries, folder
        self._small = [
            (f"{folder}/data.pkl", _pickle(entries)),
            (f"{folder}/byteorder", b"little"),
            (f"{folder}/version", b"3\n"),
        ]
        self._places: list[tuple[str, int, int, int]] = []  # name, offset, size, CRC-32
        self._head, at = b"", 0
        for name, content in self._small:
            checksum = zlib.crc32(content)
            header = _local_header(name, at, len(content), checksum)
            self._places.append((name, at, len(content), checksum))
            self._head += header + content
            at = len(self._head)
        self._names = [f"{folder}/data/{i}" for i in range(len(entries))]
        sizes = (entry.num_bytes for entry in entries)
        self._offsets = list(
            itertools.accumulate(
                zip(self._names, sizes, strict=True),
                lambda at, item: at + len(_local_header(item[0], at, item[1], 0)) + item[1],
                initial=at,
            )
        )

    def offset(self, i: int) -> int:
        """Return where the local header of entry i begins."""
        return self._offsets[i]

    def head(self) -> bytes:
        """Return the pickle and the members that say how to read it."""
        return self._head

    def before(self, i: int, checksum: int) -> bytes:
        """Return the local header of entry i."""
        return _local_header(self._names[i], self._offsets[i], self.entries[i].num_bytes, checksum)

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Return the central directory, which every reader needs."""
        sizes = [entry.num_bytes for entry in self.entries]
        places = self._places + list(
            zip(self._names, self._offsets[:-1], sizes, checksums, strict=True)
        )
        directory = b"".join(_central_header(*place) for place in places)
        return directory + _end(len(places), len(directory), self._offsets[-1])


def _local_header(name: str, at: int, size: int, checksum: int) -> bytes:
    """Return the header before a member, padded so that the member's bytes are aligned."""
    wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
    field = _in_32_bits(size)
    begin = at + 30 + len(name) + len(wide) + 4
    padding = -begin % _ALIGNMENT
    extra = wide + struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    header = struct.pack(
        "<4s5H3L2H",
        b"PK\x03\x04",
        45,
        0,
        0,
        0,
        _DOS_DATE,
        checksum,
        field,
        field,
        len(name),
        len(extra),
    )
    return header + name.encode() + extra


def _central_header(name: str, at: int, size: int, checksum: int) -> bytes:
    numbers = [size] * 2 * (size >= _LARGE) + [at] * (at >= _LARGE)
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    field = _in_32_bits(size)
    header = struct.pack(
        "<4s6H3L5H2L",
        b"PK\x01\x02",
        45,
        45,
        0,
        0,
        0,
        _DOS_DATE,
        checksum,
        field,
        field,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        _in_32_bits(at),
    )
    return header + name.encode() + extra


def _end(count: int, size: int, begin: int) -> bytes:
    """Return the end of the archive, in its 64-bit form only where necessary."""
    wide = b""
    if begin >= _LARGE or count >= 0xFFFF:
        fields = (44, 45, 45, 0, 0, count, count, size, begin)
        record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *fields)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, begin + size, 1)
        wide = record + locator
    count16 = min(count, 0xFFFF)
    return wide + struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, count16, count16, size, _in_32_bits(begin), 0
    )


def _pickle(entries: Sequence[Entry]) -> bytes:
    """Return the dictionary in protocol 2, as torch.save writes it, but without memo."""
    items = b"".join(_text(entry.name) + _tensor(i, entry) for i, entry in enumerate(entries))
    return b"\x80\x02}(" + items + b"u."


def _tensor(i: int, entry: Entry) -> bytes:
    size = entry.num_bytes // ENCODINGS[entry.dtype].itemsize
    strides = [1, *itertools.accumulate(entry.shape[:0:-1], lambda a, b: a * b)][::-1]
    kind = f"ctorch\n{_STORAGES[entry.dtype]}\n".encode()
    storage = b"(" + _text("storage") + kind + _text(str(i)) + _text("cpu") + _integer(size) + b"tQ"
    shape, strides = (b"(" + b"".join(map(_integer, n)) + b"t" for n in (entry.shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return rebuild + b"(" + storage + _integer(0) + shape + strides + b"\x89" + hooks + b"tR"


def _in_32_bits(value: int) -> int:
    return value if value < _LARGE else _IN_64_BITS


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
