"""What the pickle of a .pth file may speak of: names that stand for values of ours, and tensors.

Nothing is looked up, imported or called: a name outside `NAMES` is refused, and a tensor is a
description that has not been held against any storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MAX_AXES = 8


class RefusedPickleError(ValueError):
    """The pickle is not that of a dictionary of tensors; the message says what was found."""


@dataclass(frozen=True)
class TensorDescription:
    """What a pickle says of a tensor; none of it has been held against the storage."""

    encoding: str  # in safetensors' words
    storage: str  # the key of its bytes
    storage_size: int  # elements
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor, as a pickle speaks of them."""

    encoding: str
    key: str
    size: int


class Name:
    """One of the names a pickle may speak of."""

    def __init__(self, name: str, encoding: str | None = None) -> None:
        self.name, self.encoding = name, encoding


ORDERED_DICT = Name("collections.OrderedDict")
REBUILD_TENSOR = Name("torch._utils._rebuild_tensor_v2")
NAMES = {
    name.name: name
    for name in (
        ORDERED_DICT, REBUILD_TENSOR, Name("torch.FloatStorage", "F32"),
        Name("torch.HalfStorage", "F16"), Name("torch.BFloat16Storage", "BF16"),
    )
}  # fmt: skip


def kind_of(value: Any) -> str:
    """What to call a value; never its content, which may be endless."""
    if isinstance(value, Name):
        return f"the name {value.name}"
    return f"a value of kind {type(value).__name__.strip('_')}"


def is_text(value: Any) -> bool:
    """Whether it is a str and nothing derived from one."""
    return type(value) is str


def is_count(value: Any) -> bool:
    """Whether it is an int that a file could have so many elements of."""
    return type(value) is int and 0 <= value < 2**48


def describe(arguments: tuple[Any, ...]) -> TensorDescription:
    """What the arguments of torch._utils._rebuild_tensor_v2 say."""
    if len(arguments) != 6 or not isinstance(arguments[0], Storage):
        raise RefusedPickleError("a tensor without a storage")
    storage, offset, shape, strides, *_ = arguments
    for counts in (shape, strides):
        is_short = type(counts) is tuple and len(counts) <= _MAX_AXES
        if not is_short or not all(map(is_count, counts)):
            raise RefusedPickleError("a tensor whose shape or strides are no counts")
    if not is_count(offset) or len(shape) != len(strides):
        raise RefusedPickleError("a tensor whose offset or strides do not fit its shape")
    return TensorDescription(storage.encoding, storage.key, storage.size, offset, shape, strides)
