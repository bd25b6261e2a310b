"""Check that an operator's result is right before its speed is measured."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.ops import Quantized, reference
from codellama_rt.ops.quantized import WEIGHT_TILE, read_cache
from codellama_rt.tools.bench.op_arrays import Arrays, bind
from codellama_rt.tools.bench.op_cases import CACHES, Case

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}  # of the largest element
OTHER_TOLERANCE = 1e-2
# For a quantised cache that was written: one step, where a sum was rounded the other way.
STEP = {"int8": 1 / 127, "int4": 1 / 15}
_ROWS = 64  # minimum number of a weight's rows to compare


def check(case: Case, arrays: Arrays) -> None:
    """Compare an operator with its definition in float64, on a part if the whole takes long.

    A whole layer is compared with its single operators, whose rows are compared with their
    definitions. Afterwards the arrays hold what the operator wrote.

    Raises:
        RuntimeError: the results differ.
    """
    make = _layer if case.op.name == "decoder_layer" else _reference
    part, expected = make(case, arrays)
    bind(case.op, arrays)()
    for name, values in expected.items():
        found = _floats(name, arrays[name])[part.get(name, ...)]
        values = _floats(name, values)
        tolerance = TOLERANCE.get(case.dtype, OTHER_TOLERANCE)
        if isinstance(arrays[name], Quantized):
            tolerance = STEP[arrays[name].dtype]
        error, largest = np.abs(found - values).max(), np.abs(values).max()
        if not error <= tolerance * largest:
            raise RuntimeError(
                f"{case.op.name} {case.model} {case.label}: {name} differs from the reference by "
                f"{error:.3g} where the largest element is {largest:.3g}"
            )


def _floats(name: str, values: np.ndarray | Quantized) -> np.ndarray:
    if isinstance(values, Quantized):
        values = read_cache(values, key=name == "key_cache")
    return values.astype(np.float64)


def _reference(case: Case, arrays: Arrays) -> tuple[dict, Arrays]:
    """Return which part of the results to compare, and its expected values."""
    expected = {name: arrays[name].copy() for name in case.op.written}
    call_with = {name: expected.get(name, arrays[name]) for name in case.op.inputs}
    part, call_with = _part(case, call_with)
    returned = getattr(reference, case.op.name)(*call_with.values())
    returned = returned if isinstance(returned, tuple) else (returned,)
    return part, expected | dict(zip(case.op.outputs, returned, strict=False))


def _part(case: Case, arrays: Arrays) -> tuple[dict, Arrays]:
    """Return the part of the outputs to compare, and the inputs it depends on."""
    arrays = dict(arrays)
    if case.op.name == "linear":
        weight = arrays["weight"]
        tiles = np.arange(0, weight.shape[0] // WEIGHT_TILE, max(1, weight.shape[0] // _ROWS // 4))
        columns = (tiles[:, None] * WEIGHT_TILE + np.arange(WEIGHT_TILE)).reshape(-1)
        rows = np.arange(0, len(arrays["x"]), max(1, len(arrays["x"]) // 8))
        arrays |= {"x": arrays["x"][rows], "weight": _rows(weight, tiles)}
        return {"out": np.ix_(rows, columns)}, arrays
    if case.op.name == "embedding":
        tiles, row = np.divmod(arrays["token_ids"], WEIGHT_TILE)
        arrays["table"] = _rows(arrays["table"], tiles)
        arrays["token_ids"] = np.arange(len(tiles)) * WEIGHT_TILE + row
        return {}, arrays
    if case.op.name in ("paged_attention", "flash_attention"):  # the first head of K and V
        group = case.sizes["n_heads"] // case.sizes["n_kv_heads"]
        heads = (slice(None), slice(0, group))
        arrays["query"] = arrays["query"][heads]
        for name in {"key", "value", *CACHES} & arrays.keys():
            arrays[name] = _first_head(arrays[name])
        return {"out": heads, "lse": heads}, arrays
    return {}, arrays


def _rows(weight: np.ndarray | Quantized, tiles: np.ndarray) -> np.ndarray | Quantized:
    """Return the given tiles of 16 rows of a weight, concatenated."""
    num_rows, k = weight.shape
    if not isinstance(weight, Quantized):
        return weight.reshape(-1, WEIGHT_TILE, k)[tiles].reshape(-1, k)
    payload = weight.payload.reshape(-(-num_rows // WEIGHT_TILE), -1)[tiles]
    return Quantized(payload.reshape(-1), weight.dtype, (len(tiles) * WEIGHT_TILE, k))


def _first_head(cache: np.ndarray | Quantized) -> np.ndarray | Quantized:
    if not isinstance(cache, Quantized):
        return cache[:, :1]
    num_blocks, _, block_size, head_dim = cache.shape
    return Quantized(cache.payload[:, :1], cache.dtype, (num_blocks, 1, block_size, head_dim))


def _layer(case: Case, a: Arrays) -> tuple[dict, Arrays]:
    """Compute a layer from the single operators, one after another."""
    caches = {name: a[name].copy() for name in CACHES}
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
