"""Check the schema's axes and dtypes on MindSpore Tensors for the Ascend kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codellama_rt.ops.schema import FLOATS, OPS
from codellama_rt.ops.schema import Tensor as Description

ASCEND_FLOATS = ("float16", "bfloat16")


def check(name: str, tensors: Mapping[str, Any], **axes: int) -> None:
    """Reject shapes and dtypes that the op's description does not allow.

    Args:
        name: the op.
        tensors: its tensor arguments by name.
        axes: axis sizes that are already known.

    Raises:
        ValueError: a wrong shape, or a view that is not contiguous.
        TypeError: a wrong dtype, or not a Tensor.
    """
    op, first = OPS[name], {}
    for key, tensor in tensors.items():
        described = op.inputs[key]
        if not hasattr(tensor, "dtype") or not hasattr(tensor, "shape"):
            raise TypeError(
                f"{name}: {key} must be a mindspore.Tensor, got {type(tensor).__name__}"
            )
        _check_dtype(name, key, tensor, described, first)
        if len(tensor.shape) != len(described.axes):
            _fail(name, key, tensor, described)
        for axis, size in zip(described.axes, tensor.shape, strict=True):
            if axis.isidentifier() and axes.setdefault(axis, size) != size:
                _fail(name, key, tensor, described, f"; {axis} is {axes[axis]} elsewhere")
        if not tensor.is_contiguous():  # the kernels do not support strides
            raise ValueError(f"{name}: {key} must be contiguous, it is a view; use .contiguous()")
    _bind_composed(name, tensors, axes)
    for key, tensor in tensors.items():
        for axis, size in zip(op.inputs[key].axes, tensor.shape, strict=True):
            if _evaluate(axis, axes) != size:
                _fail(name, key, tensor, op.inputs[key], f"; {axis} is {_evaluate(axis, axes)}")
    for rule in op.constraints:
        if not _evaluate(rule, axes):
            raise ValueError(f"{name}: {rule} must hold, with {_values(rule, axes)}")


def _check_dtype(
    name: str, key: str, tensor: Any, described: Description, first: dict[str, str]
) -> None:
    """Check that floats have the first one's dtype, float16 or bfloat16."""
    allowed = described.dtypes
    if isinstance(allowed, str) or set(FLOATS) <= set(allowed):
        allowed = (first["float"],) if first else ASCEND_FLOATS
    dtype = str(tensor.dtype).lower()
    if dtype not in allowed:
        raise TypeError(
            f"{name}: {key} must be {' or '.join(allowed)} on Ascend, got {dtype}; "
            "cast it with .astype"
        )
    if dtype in ASCEND_FLOATS:
        first.setdefault("float", dtype)


def _bind_composed(name: str, tensors: Mapping[str, Any], axes: dict[str, int]) -> None:
    """Solve for axis sizes that appear only inside expressions."""
    if name == "rope_and_cache":
        heads = tensors["qkv"].shape[1] // max(axes["head_dim"], 1)
        axes["n_heads"] = max(heads - 2 * axes["n_kv_heads"], 0)
    if name == "silu_and_mul":
        axes["hidden_dim"] = tensors["gate_up"].shape[1] // 2


def _evaluate(expression: str, axes: Mapping[str, int]) -> int:
    return eval(expression, {"__builtins__": {}}, dict(axes))  # the schema's own text


def _values(rule: str, axes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in axes.items() if axis in rule)


def _fail(name: str, key: str, tensor: Any, described: Description, more: str = "") -> None:
    raise ValueError(
        f"{name}: {key} must be ({', '.join(described.axes)}), got {tuple(tensor.shape)}{more}"
    )
