"""The operators as MindSpore primitives: the same kernels in PyNative and inside `@mindspore.jit`.

Names, arguments and their order are those of `codellama_rt.ops`; tensors are `mindspore.Tensor`,
there is no `out=`, and a size may change from call to call without a new compilation where the
graph takes it as dynamic (`Cell.set_inputs`, `mindspore.enable_dynamic`, `jit(dynamic=1)`).
Attributes (eps, scale, ...) are constants of the graph. Importing this module imports MindSpore.

**Order in a graph.** MindSpore orders operators only by the data they exchange. A write whose
result nobody uses is dropped, and a reader that does not depend on the writer may run before it:

* `rope_and_cache` returns the rotated query, which `paged_attention` takes: nothing to do.
* `reshape_and_cache`, `copy_blocks` and `apply_rotary_pos_emb` have no result of their own: here
  they return a token, int32 (1). Whatever reads or overwrites what they wrote must take it
  through `mindspore.ops.depend(tensor, token)`, and the last token must be an output of the graph.
  Order a write after a read in the same way: `depend(tensor, what_was_read)`.

In PyNative operators run in the order they are called, and tokens may be ignored.

**Writing in place.** A tensor that is written must own its memory (`Tensor.from_numpy`, a
Parameter, a result): MindSpore copies a view (a slice, a reshape) before it calls a custom
operator, so the write would go to the copy and be lost. PyNative calls reject the views that can
be recognised, with a ValueError: slices (`kv[0]` of a stacked cache, `kv[:]`) and all others that
are a part of their memory or in another order. A reshape of a whole tensor cannot be recognised,
nor can a view that is an argument of a compiled graph or made in it: keep one tensor per cache.

**Errors.** A wrong dtype raises TypeError when the graph is compiled or the operator is called.
Shapes and values are checked when the operator runs: MindSpore raises a RuntimeError that names
the operator, the argument and the reason. PyNative runs asynchronously, so the error may appear at
a later call or when a result is read.

**Devices.** The ops run where MindSpore's context says: on a CPU, or on a GPU with a MindSpore
built for one, by the CUDA kernels. There attention asks MindSpore for 64 MiB of workspace, and
quantised weights and `decoder_layer` are not supported. No MindSpore of today (2.10, CUDA 11) was
seen to run these kernels.

**Quantised tensors.** In PyNative, pass a `Quantized` as in `codellama_rt.ops`, with a Tensor as
payload. Inside a graph, pass the tuple (payload, dtype, shape), of which the last two are
constants. A cache's payload is (num_blocks, n_kv_heads, bytes per block): the number and size of
its blocks may change from call to call, and are not read from the shape.

Example:
    >>> import mindspore, numpy
    >>> x = mindspore.Tensor(numpy.full((1, 2), 3, numpy.float32))
    >>> rms_norm(x, mindspore.Tensor(numpy.ones(2, numpy.float32)), 0.0).asnumpy()
    array([[1., 1.]], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor
from mindspore.ops import Custom, constexpr

from codellama_rt.ops.primitives import DEVICES, check_tensors, device, make_primitive
from codellama_rt.ops.quantized import Quantized
from codellama_rt.ops.schema import OPS
from codellama_rt.ops.schema import Tensor as Description

__all__ = [*OPS, "primitive"]


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Return rows of a table, in float32."""
    return _run("embedding", (token_ids, table))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""
    return _run("rms_norm", (x, weight), eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return rms_norm of x + residual, and that sum."""
    return _run("add_rms_norm", (x, residual, weight), eps)


def linear(x: Tensor, weight: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return x times weight transposed; up to three weights act as one with all their rows."""
    alone = not isinstance(weight, (tuple, list)) or _is_quantized(weight)
    weights = (weight,) if alone else weight
    return _run("linear", (x, *weights))


def apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate queries and keys by their positions, in place, and return a token."""
    return _run("apply_rotary_pos_emb", (query, key, cos, sin, positions), interleaved)


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Write keys and values into their slots of the cache and return a token."""
    return _run("reshape_and_cache", (key, value, key_cache, value_cache, slot_mapping))


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
    """Rotate query and key, write key and value into their slots and return the query.

    Whatever reads these blocks must take that query, or something computed from it, as
    `paged_attention` does.
    """
    tensors = (qkv, cos, sin, positions, key_cache, value_cache, slot_mapping)
    return _run("rope_and_cache", tensors, interleaved)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over contiguous keys and values of several sequences, causal from the end."""
    return _run("flash_attention", (query, key, value, cu_seqlens_q, cu_seqlens_k), causal, scale)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally over the blocks of each sequence's keys and values, one query or many."""
    tensors = (query, key_cache, value_cache, block_tables, seq_lens, cu_seqlens_q)
    return _run("paged_attention", tensors, scale)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two attentions of the same queries over disjoint keys."""
    return _run("merge_attention", (out_a, lse_a, out_b, lse_b))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return _run("silu_and_mul", (gate_up,))


def copy_blocks(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> Tensor:
    """Copy blocks of both caches, pair after pair, and return a token."""
    return _run("copy_blocks", (key_cache, value_cache, block_pairs))


def decoder_layer(
    x: Tensor,
    attention_norm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    mlp_norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    eps: float = 1e-5,
    interleaved: bool = False,
) -> Tensor:
    """Run a whole layer as one op, bit for bit the result of its single ops."""
    tensors = (
        x,
        attention_norm,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        mlp_norm,
        gate_proj,
        up_proj,
        down_proj,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        block_tables,
        seq_lens,
        cu_seqlens_q,
    )
    return _run("decoder_layer", tensors, eps, interleaved)


def primitive(
    name: str,
    *,
    num_weights: int = 1,
    target: str | None = None,
    **attributes: float | bool | None,
) -> Custom:
    """Return the primitive behind one of the functions above: faster in PyNative, fewer checks.

    Args:
        name: the op.
        num_weights: number of weights that `linear` takes after x.
        target: "CPU" or "GPU"; default: MindSpore's context.
        **attributes: the function's attributes; missing ones take their defaults.

    Returns:
        A `mindspore.ops.Custom` to be called with the tensors; equal arguments return the same
        object.

    Raises:
        ValueError: an unknown op, target or attribute, or a value out of range; no such kernel.
        TypeError: an attribute of the wrong type.
        RuntimeError: this build has no kernels for the target.

    Example:
        >>> primitive("rms_norm", eps=1e-6) is primitive("rms_norm", eps=1e-6)
        True
    """
    if name not in OPS:
        raise ValueError(f"primitive: no op named {name!r}; available: {', '.join(OPS)}")
    known = OPS[name].attributes
    for attribute in attributes.keys() - known.keys():
        raise ValueError(f"{name} has no attribute {attribute!r}; available: {', '.join(known)}")
    num_tensors = 1 + num_weights if name == "linear" else len(OPS[name].inputs)
    values = [attributes.get(key, attribute.default) for key, attribute in known.items()]
    return make_primitive(_device_of(target), name, (None,) * num_tensors, *values)


def _device_of(target: str | None) -> str:
    if target is None:
        return device()
    named = {mindspore_name: name for name, (mindspore_name, _) in DEVICES.items()}
    if target not in named:
        raise ValueError(f"primitive: target must be {' or '.join(named)}, got {target!r}")
    return named[target]


@constexpr  # evaluated while a graph is compiled
def _constant_primitive(
    name: str, formats: tuple[tuple | None, ...], *values: float | bool | None
) -> Custom:
    return make_primitive(device(), name, formats, *values)


def _run(
    name: str, tensors: tuple[Tensor, ...], *attributes: float | bool | None
) -> Tensor | tuple[Tensor, ...]:
    if not _is_compiling(_run):
        tensors = tuple(_as_tuple(tensor) for tensor in tensors)
    payloads, formats = (), ()
    for tensor in tensors:
        if _is_quantized(tensor):
            payloads, formats = (*payloads, tensor[0]), (*formats, (tensor[1], tensor[2]))
        else:
            payloads, formats = (*payloads, tensor), (*formats, None)
    if not _is_compiling(_run):
        check_tensors(name, payloads)
    return _constant_primitive(name, formats, *attributes)(*payloads)


def _as_tuple(tensor: Tensor | Quantized) -> Tensor | tuple:
    if isinstance(tensor, Quantized):
        return (tensor.payload, tensor.dtype, tuple(tensor.shape))
    return tensor


def _is_quantized(tensor: object) -> bool:
    """Return whether this is (payload, dtype, shape), the form of quantised tensors in a graph."""
    return isinstance(tensor, tuple) and len(tensor) == 3 and isinstance(tensor[1], str)


@constexpr(check=False)
def _is_compiling(function: Callable[..., object] | None) -> bool:
    """Return whether a graph is being compiled: only then is a function passed as None."""
    return function is None


def _document() -> None:
    """Append to each docstring the schema's description of the arguments and results."""
    for name, op in OPS.items():
        lines = [globals()[name].__doc__.rstrip(), "", "Args:"]
        for key, tensor in op.inputs.items():
            lines.append(f"    {key}: {_describe(tensor)}{'; written.' if tensor.written else '.'}")
        for key, attribute in op.attributes.items():
            lines.append(f"    {key}: {attribute.doc}.")
        results = [f"    {key} {_describe(tensor)}." for key, tensor in op.outputs.items()]
        lines += ["", "Returns:", *(results or ["    A token, (1) int32."])]
        globals()[name].__doc__ = "\n".join(lines)


def _describe(tensor: Description) -> str:
    same = isinstance(tensor.dtypes, str)
    dtypes = f"like {tensor.dtypes[1:]}" if same else " or ".join(tensor.dtypes)
    return f"({', '.join(tensor.axes)}) {dtypes}" + (f": {tensor.doc}" if tensor.doc else "")


_document()
