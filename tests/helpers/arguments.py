"""Valid arguments of every op, made from its schema, and how to call it with them."""

from __future__ import annotations

import numpy as np

from codellama_rt import ops
from codellama_rt.ops.dtypes import numpy_dtype
from codellama_rt.ops.schema import OPS, Op, Tensor

SIZES = {
    "num_tokens": 5, "num_seqs": 2, "num_keys": 9, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
    "num_blocks": 6, "block_size": 16, "max_blocks": 3, "num_positions": 40, "num_pairs": 3,
    "vocab_size": 11, "dim": 12, "hidden_dim": 6, "in_features": 10, "out_features": 7,
}  # fmt: skip
EMPTY = {"num_tokens": 0, "num_keys": 0, "num_pairs": 0}
OP_NAMES = sorted(OPS)

Arrays = dict[str, np.ndarray]


def axis_size(axis: str, sizes: dict[str, int]) -> int:
    """The size of an axis, which may be arithmetic over others."""
    return int(eval(axis, {"__builtins__": {}}, sizes))


def shape_of(tensor: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(axis_size(axis, sizes) for axis in tensor.axes)


def make_arguments(op: Op, sizes: dict[str, int] | None = None, seed: int = 0) -> Arrays:
    """Arrays for all inputs and outputs of `op`, by name; outputs hold numbers already."""
    sizes = SIZES | (sizes or {})
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, tensor in {**op.inputs, **op.outputs}.items():
        shape = shape_of(tensor, sizes)
        if tensor.dtypes == ("int32",):
            arrays[name] = np.asarray(_integers(name, shape, sizes, rng), np.int32).reshape(shape)
            continue
        same_as = tensor.dtypes[1:] if isinstance(tensor.dtypes, str) else None
        dtype = arrays[same_as].dtype if same_as else numpy_dtype(tensor.dtypes[0])
        arrays[name] = rng.standard_normal(shape).astype(dtype)
    return arrays


def _integers(name, shape, sizes, rng):
    if name.startswith("cu_seqlens"):
        total = sizes["num_tokens" if name.endswith("q") else "num_keys"]
        return np.linspace(0, total, shape[0]).astype(np.int32)
    num_slots = sizes["num_blocks"] * sizes["block_size"]
    return {
        "token_ids": lambda: rng.integers(0, sizes["vocab_size"], shape),
        "positions": lambda: rng.integers(0, sizes["num_positions"], shape),
        "slot_mapping": lambda: rng.permutation(num_slots)[: shape[0]] - 1,
        "block_tables": lambda: rng.permutation(sizes["num_blocks"])[: shape[0] * shape[1]],
        "seq_lens": lambda: rng.integers(
            sizes["num_tokens"], sizes["max_blocks"] * sizes["block_size"], shape
        ),
        "block_pairs": lambda: rng.integers(0, sizes["num_blocks"], shape),
    }[name]()


def call(op: Op, arrays: Arrays, *, give_out: bool = True, **attributes):
    """Call the op by name; with `give_out` the arrays named as outputs take its results."""
    inputs = {name: arrays[name] for name in op.inputs}
    if give_out and op.outputs:
        outputs = tuple(arrays[name] for name in op.outputs)
        attributes["out"] = outputs[0] if len(outputs) == 1 else outputs
    return getattr(ops, op.name)(**inputs, **attributes)


def results(op: Op, returned) -> list[np.ndarray]:
    """What the op returned, as a list in the order of its outputs."""
    if not op.outputs:
        return []
    return list(returned) if len(op.outputs) > 1 else [returned]
