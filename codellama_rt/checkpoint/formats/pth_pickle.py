"""Read the pickle in a .pth file with an interpreter that can only build descriptions.

A pickle is a program for a small stack machine. Of the standard library's Python implementation,
only the opcodes remain that torch.save emits for a dictionary of tensors, and the names a pickle
may use stand for values of ours: nothing is looked up, imported or called. `pickle.Unpickler`,
written in C, is not suitable: it hashes any dictionary key, even tuples of tuples until the stack
overflows, and allocates as much memo as an index asks for.

Here each step consumes at least one byte of the pickle and adds at most one item, so memory and
time are bounded by its length. Shared values are never traversed: nested tuples that repeat
themselves would take forever.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from typing import Any, NamedTuple

from codellama_rt.ops.dtypes import FLOATS

# The 723 tensors of a shard of 70B take under 200 kB. Interpreted, a pickle takes up to 70 times
# its size: a dictionary is one byte of it.
MAX_PICKLE_BYTES = 2**21
_MAX_AXES = 8
_OPCODES = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE "
    "SHORT_BINUNICODE EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE "
    "BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD SETITEM SETITEMS"
)


class RefusedPickleError(ValueError):
    """The pickle is not that of a dictionary of tensors; the message says what was found."""


class TensorDescription(NamedTuple):
    """A pickle's description of a tensor, not yet checked against the storage."""

    encoding: str  # safetensors' name
    storage: str  # the key of its bytes
    storage_size: int  # elements
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensor_pickle(raw: bytes) -> dict[str, TensorDescription]:
    """Interpret a pickle of a dictionary of tensors.

    Args:
        raw: the pickle.

    Returns:
        The description of each tensor, by name.

    Raises:
        RefusedPickleError: the pickle is damaged, or is anything else.

    Example:
        >>> import pickle
        >>> read_tensor_pickle(pickle.dumps({}))
        {}
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise RefusedPickleError(f"a pickle of {len(raw)} bytes; at most {MAX_PICKLE_BYTES}")
    try:
        result = _Unpickler(io.BytesIO(raw)).load()
    except RefusedPickleError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        struct.error,
    ):
        raise RefusedPickleError("a pickle that is truncated or damaged") from None
    if not isinstance(result, dict):
        raise RefusedPickleError(f"{_kind_of(result)} at the top level of the pickle")
    for name, value in result.items():
        if not isinstance(value, TensorDescription):
            raise RefusedPickleError(f"{_kind_of(value)} under the name {name!r:.100}")
    return result


class _Storage(NamedTuple):
    """The bytes of a tensor, as the pickle describes them."""

    encoding: str
    key: str
    size: int


class _Name(NamedTuple):
    """One of the names a pickle may use."""

    name: str
    encoding: str | None = None


_ORDERED_DICT = _Name("collections.OrderedDict")
_REBUILD_TENSOR = _Name("torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = _Name("torch._utils._rebuild_parameter")
_STORAGES = [_Name(f"torch.{known.storage}", known.encoding) for known in FLOATS.values()]
# No weight is made of these, but tables beside the weights are.
_STORAGES += [
    _Name(f"torch.{kind}Storage", encoding)
    for kind, encoding in (
        ("Double", "F64"),
        ("Long", "I64"),
        ("Int", "I32"),
        ("Short", "I16"),
        ("Char", "I8"),
        ("Byte", "U8"),
        ("Bool", "BOOL"),
    )
]
_NAMES = {
    name.name: name for name in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES)
}


class _Opcodes(dict):
    """The action of each opcode; an unknown one is rejected by name."""

    def __missing__(self, opcode: int) -> None:
        names = {ord(known.code): known.name for known in pickletools.opcodes}
        raise RefusedPickleError(f"{names.get(opcode, f'opcode {opcode}')} in the pickle")


class _Unpickler(pickle._Unpickler):
    """The standard library's stack machine without anything that builds, calls or changes."""

    def find_class(self, module: str, name: str) -> _Name:
        dotted = f"{module}.{name}"
        if dotted not in _NAMES:
            raise RefusedPickleError(
                f"the name {dotted!r:.200}, which no tensors need; nothing was run"
            )
        return _NAMES[dotted]

    def persistent_load(self, said: Any) -> _Storage:
        if type(said) is not tuple or len(said) != 5 or said[0] != "storage":
            raise RefusedPickleError("a persistent id that is no storage's")
        _, kind, key, location, size = said
        if not isinstance(kind, _Name) or kind.encoding is None:
            raise RefusedPickleError(f"a storage of {_kind_of(kind)}")
        if type(key) is not str or not key.isascii() or not key.isdigit() or len(key) > 10:
            raise RefusedPickleError("a storage under a key that is no number")
        if type(location) is not str or not _is_count(size):
            raise RefusedPickleError("a storage without place or size")
        return _Storage(kind.encoding, key, size)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not isinstance(function, _Name):
            raise RefusedPickleError(f"a call of {_kind_of(function)}")
        if function is _ORDERED_DICT and not arguments:
            self.append({})
        elif function is _REBUILD_TENSOR:
            self.append(_describe(arguments))
        elif function is _REBUILD_PARAMETER and _is_parameter(arguments):
            self.append(arguments[0])
        else:
            raise RefusedPickleError(f"a call of {function.name} with {len(arguments)} arguments")

    def load_build(self) -> None:
        """Ignore the state of a module's state_dict: version notes that nothing depends on."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or type(target) is not dict or set(state) - {"_metadata"}:
            raise RefusedPickleError(f"a state given to {_kind_of(target)}")

    def load_setitem(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._set_items([name, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedPickleError(f"items given to {_kind_of(target)}")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if type(name) is not str:
                raise RefusedPickleError(f"{_kind_of(name)} as a name of a tensor")
            if name in target:
                raise RefusedPickleError(f"the name {name!r:.100} twice")
            target[name] = value

    dispatch = _Opcodes()
    for _name in _OPCODES.split():
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = pickle._Unpickler.dispatch[_code]
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _describe(arguments: tuple[Any, ...]) -> TensorDescription:
    """Return the description in the arguments of torch._utils._rebuild_tensor_v2."""
    if len(arguments) != 6 or not isinstance(arguments[0], _Storage):
        raise RefusedPickleError("a tensor without a storage")
    storage, offset, shape, strides, *_ = arguments
    for counts in (shape, strides):
        is_short = type(counts) is tuple and len(counts) <= _MAX_AXES
        if not is_short or not all(map(_is_count, counts)):
            raise RefusedPickleError("a tensor whose shape or strides are no counts")
    if not _is_count(offset) or len(shape) != len(strides):
        raise RefusedPickleError("a tensor whose offset or strides do not fit its shape")
    return TensorDescription(storage.encoding, storage.key, storage.size, offset, shape, strides)


def _is_parameter(arguments: tuple[Any, ...]) -> bool:
    """Return whether they are a tensor, whether it is trained, and no hooks."""
    return (
        len(arguments) == 3
        and isinstance(arguments[0], TensorDescription)
        and type(arguments[1]) is bool
        and arguments[2] == {}
    )


def _kind_of(value: Any) -> str:
    """Return a description of a value's kind; never its content, which may be endless."""
    if isinstance(value, _Name):
        return f"the name {value.name}"
    return f"a value of kind {type(value).__name__.strip('_')}"


def _is_count(value: Any) -> bool:
    """Return whether it is an int that can be a file's number of elements."""
    return type(value) is int and 0 <= value < 2**48
