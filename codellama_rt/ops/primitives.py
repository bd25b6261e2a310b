"""Make `mindspore.ops.Custom` objects over the kernels' libraries from the schema.

On a CPU MindSpore dlopens the library that `_core` is linked with, so direct calls and graph ops
share its threads and its choice of instruction set. A GPU has a library of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore
from mindspore.ops import Custom, CustomRegOp, DataType

from codellama_rt.ops.native import _core
from codellama_rt.ops.quantized import WEIGHT_DTYPES, cache_row_bytes, check_shape
from codellama_rt.ops.schema import OPS, Attribute, Op, Tensor

Format = tuple[str, tuple[int, ...]]  # dtype and shape of the tensor that a payload encodes
# device -> MindSpore's name of it, and the library
DEVICES = {
    "cpu": ("CPU", Path(_core.__file__).with_name("libcodellama_rt_cpu.so")),
    "cuda": ("GPU", Path(_core.__file__).with_name("libcodellama_rt_cuda.so")),
}
MAX_WEIGHTS = 3
CPU_ONLY = ("decoder_layer",)
_CACHES = ("key_cache", "value_cache")


def device() -> str:
    """Return the device that MindSpore's context names: "cuda" where that is a GPU, else "cpu"."""
    return "cuda" if mindspore.get_context("device_target") == "GPU" else "cpu"


@functools.lru_cache(maxsize=None, typed=True)  # typed: 1 is not True, and must be rejected
def make_primitive(
    device: str, name: str, formats: tuple[Format | None, ...], *values: float | bool | None
) -> Custom:
    """Return one op for inputs in `formats` (None: float) with attributes as in the schema."""
    op, (target, library) = OPS[name], DEVICES[device]
    if device == "cuda" and name in CPU_ONLY:
        raise ValueError(f"{name} has no kernel for cuda; compose it of the other ops")
    if not library.is_file():
        raise RuntimeError(f"{name}: {device} has no kernels here ({library.name} is not built)")
    num_tensors = len(formats)
    inputs = _names(name, num_tensors)
    outputs = list(op.outputs) or ["token"]
    info = CustomRegOp(f"{name}{num_tensors}")
    for i, key in enumerate(inputs):
        info.input(i, key)
    for i, key in enumerate(outputs):
        info.output(i, key)
    for (key, attribute), value in zip(op.attributes.items(), values, strict=True):
        info.attr(key, "required", attribute.type, value=_checked(name, key, attribute, value))
    # One attribute for all formats: primitives of one symbol must have the same attributes.
    info.attr("formats", "required", "str", value=_describe(name, inputs, formats))
    if name == "linear":  # the ABI's shape inference is not told
        info.attr("num_weights", "required", "int", value=num_tensors - 1)
    info.dtype_format(*[DataType.None_None] * (len(inputs) + len(outputs))).target(target)
    return Custom(
        f"{library}:clrt_{name}",
        None,  # shapes: the library's clrt_<name>InferShape; other kinds reject dynamic shapes
        _type_inference(op, inputs, formats),
        "aot",
        reg_info=info.get_op_info(),
    )


def check_tensors(name: str, tensors: tuple[Any, ...]) -> None:
    """Reject, in PyNative, what would crash MindSpore or be copied before it is written.

    Raises:
        TypeError: an argument is not a Tensor.
        ValueError: an argument to be written is a view.
    """
    op = OPS[name]
    for key, tensor in zip(_names(name, len(tensors)), tensors, strict=True):
        if not isinstance(tensor, mindspore.Tensor):
            raise TypeError(
                f"{name}: {key} must be a mindspore.Tensor, got {type(tensor).__name__}; "
                "make one with Tensor.from_numpy"
            )
        if key in op.written and _is_view(tensor):
            raise ValueError(
                f"{name}: {key} {tensor.shape} is written in place, but it is a view, and "
                "MindSpore would write to a copy instead; make it with Tensor.from_numpy"
            )


def _is_view(tensor: mindspore.Tensor) -> bool:
    """Return whether a tensor is a slice, a part of its memory, or in another order.

    MindSpore does not say so of a reshape of a whole tensor.
    """
    return (
        tensor.parent_tensor_ is not None
        or tensor.storage_offset() != 0
        or not tensor.is_contiguous()
        or tensor.untyped_storage().size() != tensor.nbytes
    )


@functools.cache
def _names(name: str, num_tensors: int) -> tuple[str, ...]:
    names = tuple(OPS[name].inputs)
    if name != "linear":
        return names
    if not 1 <= num_tensors - 1 <= MAX_WEIGHTS:
        raise ValueError(f"linear: takes 1 to {MAX_WEIGHTS} weights, got {num_tensors - 1}")
    return names + tuple(f"weight_{i}" for i in range(2, num_tensors))


def _describe(op: str, names: tuple[str, ...], formats: tuple[Format | None, ...]) -> str:
    """Encode the formats for `csrc/bind/mindspore.cc`: dtype, bytes of a token's row, shape.

    The number and size of a cache's blocks may change: they follow from its payload's shape.
    """
    entries = [
        "" if format_ is None else _entry(op, name, *format_)
        for name, format_ in zip(names, formats, strict=True)
    ]
    return ";".join([*entries, ""])


def _entry(op: str, key: str, dtype: str, shape: tuple[int, ...]) -> str:
    check_shape(shape)
    row_bytes = 0
    if key in _CACHES:
        row_bytes = cache_row_bytes(dtype, shape[3])[_CACHES.index(key)]
        shape = (-1, shape[1], -1, shape[3])
    elif dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{op}: {key} must be {' or '.join(WEIGHT_DTYPES)}, got {dtype}")
    return " ".join(map(str, (dtype, row_bytes, *shape)))


def _checked(op: str, key: str, attribute: Attribute, value: Any) -> float | bool:
    if attribute.type == "bool":
        if isinstance(value, bool):
            return value
        raise TypeError(f"{op}: {key} must be a bool, got {value!r}")
    if value is None and attribute.default == 0:  # 0 asks the kernels for the usual value
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {key} must be a float, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{op}: {key} must be finite and not negative, got {value}")
    return float(value)


def _type_inference(
    op: Op, names: tuple[str, ...], formats: tuple[Format | None, ...]
) -> Callable[..., Any]:
    """Return the function that MindSpore calls for result dtypes; it also checks the inputs'."""
    inputs = [op.inputs.get(name, op.inputs.get("weight")) for name in names]

    def infer(*types: Any) -> Any:
        if len(types) != len(names):
            raise TypeError(f"{op.name} takes {len(names)} tensors, got {len(types)}")
        given: dict[str, str] = {}
        for name, tensor, type_, format_ in zip(names, inputs, types, formats, strict=True):
            given[name] = _checked_dtype(op, name, tensor, (type_, format_), given)
        results = tuple(_result_type(output, given) for output in op.outputs.values())
        return results if len(results) > 1 else (*results, mindspore.int32)[0]

    return infer


def _checked_dtype(
    op: Op, name: str, tensor: Tensor, given_as: tuple[Any, Format | None], given: dict[str, str]
) -> str:
    """Return the name of the dtype (or of the encoded dtype), if the schema allows it."""
    type_, format_ = given_as
    dtype = str(type_.element_type() if hasattr(type_, "element_type") else type_).lower()
    if format_ is not None and dtype == "uint8":
        dtype = format_[0]
    allowed = tensor.dtypes
    if isinstance(allowed, str):
        allowed = (given[allowed[1:]],)
    elif name not in op.inputs:  # a further weight
        allowed = (given["weight"],)
    if not isinstance(tensor.dtypes, str):  # a plain int8 tensor is not a quantised one
        allowed = tuple(a for a in allowed if (format_ is not None) == (a in WEIGHT_DTYPES))
    if dtype in allowed:
        return dtype
    raise TypeError(
        f"{op.name}: {name} must be {' or '.join(allowed)} ({', '.join(tensor.axes)}), "
        f"got {dtype}; cast it with .astype"
    )


def _result_type(output: Tensor, given: dict[str, str]) -> Any:
    dtypes = output.dtypes
    return getattr(mindspore, given[dtypes[1:]] if isinstance(dtypes, str) else dtypes[0])
