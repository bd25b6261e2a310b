"""The Ascend kernels as `mindspore.ops.Custom` primitives, for graphs on an NPU.

Names, arguments and results are those of `codellama_rt.ops.ascend`. MindSpore finds an operator of
an installed CANN package by its name: it reads the package's header, compiles a callback for the
first of aclnn's two phases, and calls both itself. Lengths and attributes are constants of a graph:
a step with other lengths needs another graph. `rope_and_cache` returns the rotated query, which
`paged_attention` takes, so their order is fixed. `reshape_and_cache` is not available: it has no
result, and MindSpore does not support such operators.

In PyNative mode use `codellama_rt.ops.ascend`. Importing this module imports MindSpore.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import mindspore
from mindspore import Tensor
from mindspore.ops import Custom, CustomRegOp

from codellama_rt.model.ascend.checks import ASCEND_FLOATS
from codellama_rt.model.ascend.ops import require_halves
from codellama_rt.ops.ascend_library import AscendUnavailable
from codellama_rt.ops.schema import FLOAT32, INT32, OPS
from codellama_rt.ops.schema import Tensor as Description

LENGTHS = ("seq_lens", "cu_seqlens_q")  # in host memory: aclIntArray
HALVES_ONLY = "interleaved"  # not an attribute of the Ascend kernels

# Result shapes (or dtypes) of each op as functions of its arguments' shapes (or dtypes).
_SHAPES: dict[str, Callable] = {
    "rms_norm": lambda x, *_: x,
    "add_rms_norm": lambda x, *_: (x, x),
    "silu_and_mul": lambda gate_up: (gate_up[0], gate_up[1] // 2),
    "rope_and_cache": lambda qkv, cos, sin, positions, cache, *_: (
        qkv[0],
        qkv[1] // cache[3] - 2 * cache[1],
        cache[3],
    ),
    "paged_attention": lambda query, *_: (query, query[:2]),
}
_DTYPES: dict[str, Callable] = {
    "rms_norm": lambda x, *_: x,
    "add_rms_norm": lambda x, *_: (x, x),
    "silu_and_mul": lambda gate_up: gate_up,
    "rope_and_cache": lambda qkv, *_: qkv,
    "paged_attention": lambda query, *_: (query, mindspore.float32),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight: x (num_tokens, dim), weight (dim)."""
    return primitive("rms_norm")(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) of s = x + residual, rounded to their dtype; (num_tokens, dim)."""
    return primitive("add_rms_norm")(x, residual, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: (num_tokens, 2 * hidden_dim) -> (num_tokens, hidden_dim)."""
    return primitive("silu_and_mul")(gate_up)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate query and key of qkv, write key and value to their slots and return the query."""
    require_halves(interleaved)
    return primitive("rope_and_cache")(
        qkv, cos, sin, positions, key_cache, value_cache, slot_mapping
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Sequence[int],
    cu_seqlens_q: Sequence[int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally over blocks, split over the vector cores; returns (out, lse)."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return primitive("paged_attention")(
        query, key_cache, value_cache, block_tables, tuple(seq_lens), tuple(cu_seqlens_q), factor
    )


@functools.cache
def primitive(name: str) -> Custom:
    """Return the primitive behind a function above; it takes tensors, lengths, attributes.

    Raises:
        ValueError: an unknown op.
        RuntimeError: MindSpore does not run on an NPU, or the package does not have the op.
    """
    if name not in _SHAPES:
        raise ValueError(f"primitive: no Ascend op named {name!r}; available: {', '.join(_SHAPES)}")
    if mindspore.get_context("device_target") != "Ascend":
        raise AscendUnavailable(
            "graphs of Ascend kernels need MindSpore on an NPU, but its device is "
            f"{mindspore.get_context('device_target')}"
        )
    return Custom(
        aclnn_name(name), _SHAPES[name], _DTYPES[name], func_type="aot", reg_info=describe(name)
    )


def aclnn_name(name: str) -> str:
    """Return the op's name in CANN: "rms_norm" -> "aclnnClrtRmsNorm"."""
    return "aclnnClrt" + "".join(part.capitalize() for part in name.split("_"))


def describe(name: str) -> dict:
    """Return the registration that MindSpore needs for an op of CANN.

    The one that MindSpore derives from the package's JSON counts tensors written in place twice.
    """
    op, registration = OPS[name], CustomRegOp(aclnn_name(name))
    tensors = {key: tensor for key, tensor in op.inputs.items() if key not in LENGTHS}
    for i, key in enumerate(tensors):
        registration.input(i, key, "required")
    for key in (key for key in op.inputs if key in LENGTHS):
        registration.attr(key, "required", "listInt")
    for key in (key for key in op.attributes if key != HALVES_ONLY):
        registration.attr(key, "required", "double")
    for i, key in enumerate(op.outputs):
        registration.output(i, key, "required")
    for dtype in ASCEND_FLOATS:
        described = [*tensors.values(), *op.outputs.values()]
        registration.dtype_format(*[(_dtype(t, dtype), "DefaultFormat") for t in described])
    return registration.target("Ascend").get_op_info()


def _dtype(tensor: Description, dtype: str) -> str:
    """Return the dtype of a tensor in an op whose floats are `dtype`."""
    return tensor.dtypes[0] if tensor.dtypes in (INT32, FLOAT32) else dtype
