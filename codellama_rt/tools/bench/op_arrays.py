"""Arguments of operators: noise of the right shapes, in buffers that are used in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from codellama_rt import ops
from codellama_rt.ops import Quantized
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.ops.quantized import empty_caches
from codellama_rt.ops.schema import Op
from codellama_rt.tools.bench.noise import fill_caches, noise, quantized_noise
from codellama_rt.tools.bench.op_cases import BLOCK_SIZE, CACHES, Case
from codellama_rt.tools.limits import PROBE_BYTES

Arrays = dict[str, np.ndarray | Quantized]


def make_arrays(case: Case, rng: np.random.Generator) -> Arrays:
    """Return all arguments and results of a case by name: one sequence, queries at its end."""
    made = {}
    for name in case.tensors:
        shape, dtype = case.shape_of(name), case.dtype_of(name)
        if dtype == "int32":
            made[name] = _integers(name, shape, case.sizes, rng)
        elif dtype in FLOAT_DTYPES:
            made[name] = noise(shape, dtype, rng)
        elif name not in CACHES:
            made[name] = quantized_noise(shape, dtype, rng)
    if "key_cache" in case.tensors and "key_cache" not in made:
        caches = empty_caches(case.dtype, case.shape_of("key_cache"))
        fill_caches(*caches, rng)
        made |= zip(CACHES, caches, strict=True)
    return made


def bind(op: Op, arrays: Arrays) -> Callable[[], object]:
    """Return the call, on preallocated results, as the model makes it."""
    inputs = [arrays[name] for name in op.inputs]
    outputs = tuple(arrays[name] for name in op.outputs)
    given = {} if not outputs else {"out": outputs if len(outputs) > 1 else outputs[0]}
    return partial(getattr(ops, op.name), *inputs, **given)


class Turns:
    """Copies of a case's arrays, together larger than any cache; each run uses the next copy.

    Table indices change with every run as well.
    """

    def __init__(self, case: Case, arrays: Arrays, num_bytes: int = PROBE_BYTES) -> None:
        """Copy `arrays` until they take `num_bytes`."""
        self._case, self._next = case, 0
        set_bytes = sum(array.nbytes for array in arrays.values())
        self._copies = max(1, -(-num_bytes // set_bytes))
        self._arrays = {name: _repeated(array, self._copies) for name, array in arrays.items()}
        self._rng = np.random.default_rng(4)
        self.advance()

    def advance(self) -> None:
        """Switch to the next copy."""
        arrays = {name: copies[self._next] for name, copies in self._arrays.items()}
        if "token_ids" in arrays:
            ids = arrays["token_ids"]
            ids[:] = self._rng.integers(0, self._case.sizes["vocab_size"], ids.shape)
        self._call = bind(self._case.op, arrays)
        self._next = (self._next + 1) % self._copies

    def run(self) -> None:
        """Call the operator on the current copy."""
        self._call()


def _repeated(array: np.ndarray | Quantized, copies: int) -> Sequence[np.ndarray | Quantized]:
    if copies == 1:
        return [array]
    if isinstance(array, Quantized):
        payloads = np.repeat(array.payload[None], copies, axis=0)
        return [Quantized(payload, array.dtype, array.shape) for payload in payloads]
    return np.repeat(array[None], copies, axis=0)


def _integers(name: str, shape: tuple, sizes: dict, rng: np.random.Generator) -> np.ndarray:
    """Return positions, lengths, and blocks in random order."""
    num_tokens = sizes.get("num_tokens", 0)
    num_keys = sizes.get("num_keys", num_tokens)
    positions = np.arange(num_keys - num_tokens, num_keys)
    blocks = np.random.default_rng(3).permutation(sizes.get("num_blocks", 1))
    values = {
        "token_ids": lambda: rng.integers(0, sizes["vocab_size"], shape),
        "positions": lambda: positions,
        "slot_mapping": lambda: (
            blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        ),
        "block_tables": lambda: blocks[None, :],
        "seq_lens": lambda: np.array([num_keys]),
        "cu_seqlens_q": lambda: np.array([0, num_tokens]),
        "cu_seqlens_k": lambda: np.array([0, num_keys]),
        "block_pairs": lambda: blocks[: shape[0] * 2].reshape(shape),
    }[name]()
    return values.astype(np.int32).reshape(shape)
