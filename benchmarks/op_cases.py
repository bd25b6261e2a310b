"""Every operator at Code Llama's shapes: what to call it with, and whether its result is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from shapes import linear_shapes

from codellama_rt import ops
from codellama_rt.config import ModelConfig
from codellama_rt.dtypes import numpy_dtype
from codellama_rt.ops import reference
from codellama_rt.ops.schema import ITEM_SIZE, OPS, Op, Tensor

BLOCK_SIZE = 64
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}  # of the largest element
_STORED = {  # arguments in the dtype of weights and cache; all others are float32 activations
    "table", "weight", "key_cache", "value_cache", "attention_norm", "q_proj", "k_proj", "v_proj",
    "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj",
}  # fmt: skip
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One operator with sizes for its axes and a dtype for weights and cache."""

    op: Op
    label: str
    dtype: str
    sizes: dict[str, int] = field(hash=False)

    def dtype_of(self, name: str, tensor: Tensor) -> str:
        if tensor.dtypes in (("int32",), ("float32",)):
            return tensor.dtypes[0]
        if isinstance(tensor.dtypes, str):
            name = tensor.dtypes[1:]
        if self.op.name == "flash_attention" and name == "key":
            return self.dtype
        return self.dtype if name in _STORED else "float32"

    @property
    def num_bytes(self) -> int:
        tensors = {**self.op.inputs, **self.op.outputs}
        item_sizes = {name: ITEM_SIZE[self.dtype_of(name, t)] for name, t in tensors.items()}
        return self.op.num_bytes(self.sizes, item_sizes)

    @property
    def flops(self) -> int:
        return self.op.flops(self.sizes)

    @property
    def product_dtype(self) -> str:
        """What is multiplied: pairs of bfloat16 in products with weights and cache."""
        products = ("linear", "flash_attention", "paged_attention", "decoder_layer")
        return self.dtype if self.op.name in products else "float32"

    def arrays(self, rng: np.random.Generator) -> Arrays:
        """All inputs and outputs by name."""
        made = {}
        for name, tensor in {**self.op.inputs, **self.op.outputs}.items():
            shape = tuple(self._size(axis) for axis in tensor.axes)
            if self.dtype_of(name, tensor) == "int32":
                made[name] = _integers(name, shape, self.sizes, rng)
            else:
                made[name] = rng.random(shape, np.float32)
                made[name] -= np.float32(0.5)
                made[name] = made[name].astype(numpy_dtype(self.dtype_of(name, tensor)), copy=False)
        return made

    def _size(self, axis: str) -> int:
        return int(eval(axis, {"__builtins__": {}}, self.sizes))


def call(op: Op, arrays: Arrays) -> None:
    """The operator on preallocated results, as the model calls it."""
    inputs = [arrays[name] for name in op.inputs]
    outputs = tuple(arrays[name] for name in op.outputs)
    attributes = {} if not outputs else {"out": outputs if len(outputs) > 1 else outputs[0]}
    getattr(ops, op.name)(*inputs, **attributes)


def _integers(name: str, shape: tuple, sizes: dict, rng: np.random.Generator) -> np.ndarray:
    """One sequence, whose tokens are its last, on pages in random order."""
    num_tokens = sizes.get("num_tokens", 0)
    num_keys = sizes.get("num_keys", num_tokens)
    positions = np.arange(num_keys - num_tokens, num_keys)
    pages = np.random.default_rng(3).permutation(sizes.get("num_blocks", 1))
    values = {
        "token_ids": lambda: rng.integers(0, sizes["vocab_size"], shape),
        "positions": lambda: positions,
        "slot_mapping": lambda: (
            pages[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        ),
        "block_tables": lambda: pages[None, :],
        "seq_lens": lambda: np.array([num_keys]),
        "cu_seqlens_q": lambda: np.array([0, num_tokens]),
        "cu_seqlens_k": lambda: np.array([0, num_keys]),
        "block_pairs": lambda: pages[: shape[0] * 2].reshape(shape),
    }[name]()
    return values.astype(np.int32).reshape(shape)


def cases(config: ModelConfig, dtype: str, tokens: list[int], keys: list[int]) -> Iterator[Case]:
    """Operators of a model's step.

    Args:
        config: the model.
        dtype: of weights and cache.
        tokens: tokens of a step: 1 is decoding, 512 a chunk of a prompt.
        keys: lengths of the context that attention reads.
    """
    for num_tokens in tokens:
        for name, (n, k) in linear_shapes(config).items():
            sizes = {"num_tokens": num_tokens, "out_features": n, "in_features": k}
            yield Case(OPS["linear"], f"{name} {num_tokens}x{k}x{n}", dtype, sizes)
        sizes = _sizes(config, num_tokens, num_tokens)
        for name in ("embedding", "rms_norm", "add_rms_norm", "silu_and_mul", "rope_and_cache",
                     "apply_rotary_pos_emb", "reshape_and_cache", "merge_attention"):  # fmt: skip
            yield Case(OPS[name], f"{num_tokens} tokens", dtype, sizes)
        for num_keys in keys:
            if num_keys < num_tokens:
                continue
            label = f"{num_tokens} of {num_keys} tokens"
            sizes = _sizes(config, num_tokens, num_keys)
            yield Case(OPS["paged_attention"], label, dtype, sizes)
            yield Case(OPS["flash_attention"], label, dtype, sizes)
    yield Case(OPS["copy_blocks"], "8 pages", dtype, _sizes(config, 1, 32 * BLOCK_SIZE))


def _sizes(config: ModelConfig, num_tokens: int, num_keys: int) -> dict[str, int]:
    num_blocks = -(-num_keys // BLOCK_SIZE)
    return {
        "num_tokens": num_tokens, "num_keys": num_keys, "num_seqs": 1, "num_positions": num_keys,
        "num_scores": num_tokens * (num_keys - num_tokens) + num_tokens * (num_tokens + 1) // 2,
        "num_blocks": num_blocks, "max_blocks": num_blocks, "block_size": BLOCK_SIZE,
        "num_pairs": 8, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "dim": config.dim, "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }  # fmt: skip


def check(case: Case, rng: np.random.Generator) -> None:
    """Compare the operator with its definition in float64, on a part where the whole takes long.

    Raises:
        RuntimeError: the results differ.
    """
    arrays = case.arrays(rng)
    expected = {name: array.copy() for name, array in arrays.items() if name in case.op.written}
    call_with = {name: expected.get(name, arrays[name]) for name in case.op.inputs}
    part, call_with = _part(case, call_with)
    returned = getattr(reference, case.op.name)(*call_with.values())
    returned = returned if isinstance(returned, tuple) else (returned,)
    expected |= dict(zip(case.op.outputs, returned, strict=False))
    call(case.op, arrays)
    for name, values in expected.items():
        found = arrays[name][part.get(name, ...)].astype(np.float64)
        values = values.astype(np.float64)
        error, largest = np.abs(found - values).max(), np.abs(values).max()
        if not error <= TOLERANCE[case.dtype] * largest:
            raise RuntimeError(
                f"{case.op.name} {case.label}: {name} differs from the reference by {error:.3g} "
                f"where the largest element is {largest:.3g}"
            )


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
