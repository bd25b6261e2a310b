"""Files as torch.save writes them, made by hand, well formed or not."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(
    key: str = "0", size: int = 4, kind: bytes = name_of("torch", "FloatStorage"),
    word: str = "storage",
) -> bytes:  # fmt: skip
    return b"(" + text(word) + kind + text(key) + text("cpu") + number(size) + b"tQ"


def tensor(
    shape: bytes = numbers(2, 2), strides: bytes = numbers(2, 1), offset: bytes = number(0),
    stored: bytes | None = None,
) -> bytes:  # fmt: skip
    hooks = name_of("collections", "OrderedDict") + b")R"
    stored = storage() if stored is None else stored
    return (
        name_of("torch._utils", "_rebuild_tensor_v2")
        + b"(" + stored + offset + shape + strides + b"\x89" + hooks + b"tR"
    )  # fmt: skip


def pickled(value: bytes) -> bytes:
    """A dictionary with one value."""
    return b"\x80\x02}" + text("w") + value + b"s."


def call(module: str, name: str, argument: str) -> bytes:
    """What runs module.name(argument) in Python's own unpickler."""
    return pickled(name_of(module, name) + b"(" + text(argument) + b"tR")


def archive(
    members: Mapping[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as writer:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            writer.writestr(name, content)
    return file.getvalue()


def pth(pickle: bytes, data: bytes = bytes(16), **changes: bytes) -> bytes:
    """An archive with a pickle and one storage of 16 bytes."""
    return archive({"a/data.pkl": pickle, "a/data/0": data, "a/version": b"3\n"} | changes)


STORAGES = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16",
    "int64": "Long", "int32": "Int", "uint8": "Byte", "bool": "Bool",
}  # fmt: skip


def saved(tensors: Mapping[str, np.ndarray], *, parameters: bool = False) -> bytes:
    """What torch.save writes of a dictionary, of tensors or of parameters."""
    items, members = b"", {}
    for key, (name, array) in enumerate(tensors.items()):
        kind = name_of("torch", f"{STORAGES[array.dtype.name]}Storage")
        strides = [stride // array.itemsize for stride in np.ascontiguousarray(array).strides]
        value = tensor(
            numbers(*array.shape), numbers(*strides), number(0), storage(str(key), array.size, kind)
        )
        if parameters:
            hooks = name_of("collections", "OrderedDict") + b")R"
            value = name_of("torch._utils", "_rebuild_parameter") + b"(" + value
            value += b"\x88" + hooks + b"tR"
        items += text(name) + value
        members[f"a/data/{key}"] = array.tobytes()
    pickle = b"\x80\x02" + name_of("collections", "OrderedDict") + b")R(" + items + b"u."
    return archive({"a/data.pkl": pickle} | members | {"a/version": b"3\n"})
