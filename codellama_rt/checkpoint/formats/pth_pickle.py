"""The pickle inside a .pth file, read by an interpreter that can build nothing but descriptions.

Python's own unpickler is not involved. A pickle is a program for a small stack machine; of its
opcodes those are known here that torch.save emits for a dictionary of tensors, and of the names it
may speak of only those of `tensor_description`, each of which stands for a value of ours: nothing
is looked up, imported or called. Every other opcode, name or argument is refused.

A step costs at least a byte of the pickle, and adds one item at most, so that memory and time are
bounded by its length. What is shared is shared here, too, and is never walked: nested tuples that
repeat themselves would take for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from codellama_rt.checkpoint.formats.pth_tensors import (
    NAMES,
    ORDERED_DICT,
    REBUILD_TENSOR,
    Name,
    RefusedPickleError,
    Storage,
    TensorDescription,
    describe,
    is_count,
    is_text,
    kind_of,
)

MAX_PICKLE_BYTES = 2**24  # the 723 tensors of a shard of 70B take under 200 kB
_MARK = object()


def read_tensor_pickle(raw: bytes) -> dict[str, TensorDescription]:
    """Interprets a pickle of a dictionary of tensors.

    Args:
        raw: the pickle.

    Returns:
        What it says of each tensor, by name.

    Raises:
        RefusedPickleError: it is damaged, or does anything else.

    Example:
        >>> import pickle
        >>> read_tensor_pickle(pickle.dumps({}))
        {}
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise RefusedPickleError(f"a pickle of {len(raw)} bytes; at most {MAX_PICKLE_BYTES}")
    try:
        result = _Machine(raw).run()
    except (IndexError, KeyError, struct.error):
        raise RefusedPickleError("a pickle that is truncated or damaged") from None
    if not isinstance(result, dict):
        raise RefusedPickleError(f"{kind_of(result)} at the top level of the pickle")
    for name, value in result.items():
        if not isinstance(value, TensorDescription):
            raise RefusedPickleError(f"{kind_of(value)} under the name {name!r:.100}")
    return result


class _Machine:
    """The stack machine."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Executes up to STOP; returns what is left."""
        while True:
            opcode = self._take(1)
            if opcode == b".":
                return self._stack.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                said = _REFUSED.get(opcode, f"opcode {opcode!r}")
                raise RefusedPickleError(f"{said} in the pickle at byte {self._at - 1}")
            action(self)

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._raw):
            raise IndexError
        return self._raw[self._at - count : self._at]

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _to_mark(self) -> list[Any]:
        """Pops what lies above the last mark, and the mark."""
        begin = len(self._stack) - 1
        while self._stack[begin] is not _MARK:
            begin -= 1
            if begin < 0:
                raise IndexError
        items = self._stack[begin + 1 :]
        del self._stack[begin:]
        return items

    def protocol(self) -> None:
        if self._number("<B") > 5:
            raise RefusedPickleError("a pickle of an unknown protocol")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_text(self, form: str) -> None:
        try:
            self.push(self._take(self._number(form)).decode())
        except UnicodeDecodeError:
            raise RefusedPickleError("text that is not UTF-8") from None

    def push_long(self) -> None:
        length = self._number("<B")
        if length > 8:
            raise RefusedPickleError(f"an integer of {length} bytes")
        self.push(int.from_bytes(self._take(length), "little", signed=True))

    def push_tuple(self, count: int | None) -> None:
        if count is None:
            self.push(tuple(self._to_mark()))
            return
        items = [self._stack.pop() for _ in range(count)]
        if _MARK in items:
            raise IndexError
        self.push(tuple(reversed(items)))

    def store(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def push_global(self) -> None:
        names = []
        for _ in range(2):
            end = self._raw.find(b"\n", self._at, self._at + 200)
            if end < 0:
                raise RefusedPickleError("a name without an end")
            names.append(self._take(end - self._at).decode("latin-1"))
            self._take(1)
        self._push_name(*names)

    def push_stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedPickleError(f"{kind_of(name)} as a name")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        dotted = f"{module}.{name}"
        if dotted not in NAMES:
            raise RefusedPickleError(
                f"the name {dotted!r:.200}, which no tensors of floats need; nothing was run"
            )
        self.push(NAMES[dotted])

    def push_persistent(self) -> None:
        said = self._stack.pop()
        if type(said) is not tuple or len(said) != 5 or said[0] != "storage":
            raise RefusedPickleError("a persistent id that is no storage's")
        _, kind, key, location, size = said
        if not isinstance(kind, Name) or kind.encoding is None:
            raise RefusedPickleError(f"a storage of {kind_of(kind)}")
        if not is_text(key) or not key.isascii() or not key.isdigit() or len(key) > 10:
            raise RefusedPickleError("a storage under a key that is no number")
        if not is_text(location) or not is_count(size):
            raise RefusedPickleError("a storage without place or size")
        self.push(Storage(kind.encoding, key, size))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or not isinstance(function, Name):
            raise RefusedPickleError(f"a call of {kind_of(function)}")
        if function is ORDERED_DICT and not arguments:
            self.push({})
        elif function is REBUILD_TENSOR:
            self.push(describe(arguments))
        else:
            raise RefusedPickleError(f"a call of {function.name} with {len(arguments)} arguments")

    def build(self) -> None:
        """A module's state_dict bears notes of its parts' versions, of which nothing depends."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(state) is not dict or type(target) is not dict or set(state) - {"_metadata"}:
            raise RefusedPickleError(f"a state given to {kind_of(target)}")

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedPickleError(f"items given to {kind_of(target)}")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not is_text(name):
                raise RefusedPickleError(f"{kind_of(name)} as a name of a tensor")
            if name in target:
                raise RefusedPickleError(f"the name {name!r:.100} twice")
            target[name] = value

    def set_item(self) -> None:
        value, name = self._stack.pop(), self._stack.pop()
        self.set_items([name, value])


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": lambda m: m._number("<Q"),  # FRAME: a hint on reading
    b"(": lambda m: m.push(_MARK),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m._number("<B")),
    b"M": lambda m: m.push(m._number("<H")),
    b"J": lambda m: m.push(m._number("<i")),
    b"\x8a": _Machine.push_long,
    b"X": lambda m: m.push_text("<I"),
    b"\x8c": lambda m: m.push_text("<B"),
    b"t": lambda m: m.push_tuple(None),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"q": lambda m: m.store(m._number("<B")),
    b"r": lambda m: m.store(m._number("<I")),
    b"\x94": lambda m: m.store(len(m._memo)),
    b"h": lambda m: m.push(m._memo[m._number("<B")]),
    b"j": lambda m: m.push(m._memo[m._number("<I")]),
    b"c": _Machine.push_global,
    b"\x93": _Machine.push_stack_global,
    b"Q": _Machine.push_persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"u": lambda m: m.set_items(m._to_mark()),
    b"s": _Machine.set_item,
}
_REFUSED = {  # what else can call something, by its name in pickletools
    b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"P": "PERSID",
    b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"a": "APPEND", b"e": "APPENDS",
    b"\x90": "ADDITEMS",
}  # fmt: skip
