"""Whether an operator's result is right, before its speed is anyone's concern."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.bench.op_arrays import Arrays, bind
from codellama_rt.bench.op_cases import Case
from codellama_rt.ops import reference

TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}  # of the largest element


def check(case: Case, arrays: Arrays) -> None:
    """Compare the operator with its definition in float64, on a part where the whole takes long.

    A whole layer is compared with the single operators it consists of, whose rows are compared
    with their definitions. Afterwards the arrays hold what the operator wrote.

    Raises:
        RuntimeError: the results differ.
    """
    part, expected = _layer(case, arrays) if _is_layer(case) else _reference(case, arrays)
    bind(case.op, arrays)()
    for name, values in expected.items():
        found = arrays[name][part.get(name, ...)].astype(np.float64)
        values = values.astype(np.float64)
        error, largest = np.abs(found - values).max(), np.abs(values).max()
        if not error <= TOLERANCE[case.dtype] * largest:
            raise RuntimeError(
                f"{case.op.name} {case.model} {case.label}: {name} differs from the reference by "
                f"{error:.3g} where the largest element is {largest:.3g}"
            )


def _is_layer(case: Case) -> bool:
    return case.op.name == "decoder_layer"


def _reference(case: Case, arrays: Arrays) -> tuple[dict, Arrays]:
    """Which part of the results to compare, and what it should be."""
    expected = {name: arrays[name].copy() for name in case.op.written}
    call_with = {name: expected.get(name, arrays[name]) for name in case.op.inputs}
    part, call_with = _part(case, call_with)
    returned = getattr(reference, case.op.name)(*call_with.values())
    returned = returned if isinstance(returned, tuple) else (returned,)
    return part, expected | dict(zip(case.op.outputs, returned, strict=False))


def _part(case: Case, arrays: Arrays) -> tuple[dict, Arrays]:
    """The part of the outputs to compare, and the inputs it follows from."""
    arrays = dict(arrays)
    if case.op.name == "linear":
        columns = slice(0, None, max(1, len(arrays["weight"]) // 64))
        rows = slice(0, None, max(1, len(arrays["x"]) // 8))
        arrays |= {"x": arrays["x"][rows], "weight": arrays["weight"][columns]}
        return {"out": (rows, columns)}, arrays
    if case.op.name in ("paged_attention", "flash_attention"):  # the first head of K and V
        group = case.sizes["n_heads"] // case.sizes["n_kv_heads"]
        heads = (slice(None), slice(0, group))
        arrays["query"] = arrays["query"][heads]
        for name in ("key", "value", "key_cache", "value_cache"):
            if name in arrays:
                arrays[name] = arrays[name][:, :1]
        return {"out": heads, "lse": heads}, arrays
    return {}, arrays


def _layer(case: Case, a: Arrays) -> tuple[dict, Arrays]:
    """What the single operators make of a layer, one after another."""
    caches = {name: a[name].copy() for name in ("key_cache", "value_cache")}
    x = ops.rms_norm(a["x"], a["attention_norm"])
    qkv = ops.linear(x, (a["q_proj"], a["k_proj"], a["v_proj"]))
    query = ops.rope_and_cache(
        qkv, a["cos"], a["sin"], a["positions"], *caches.values(), a["slot_mapping"]
    )
    sequences = (a[name] for name in ("block_tables", "seq_lens", "cu_seqlens_q"))
    attended, _ = ops.paged_attention(query, *caches.values(), *sequences)
    sublayer = ops.linear(attended.reshape(len(query), -1), a["o_proj"])
    x, residual = ops.add_rms_norm(sublayer, a["x"], a["mlp_norm"])
    hidden = ops.silu_and_mul(ops.linear(x, (a["gate_proj"], a["up_proj"])))
    return {}, {"out": residual + ops.linear(hidden, a["down_proj"]), **caches}
