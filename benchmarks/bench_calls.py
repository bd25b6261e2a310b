"""The cost of calling a kernel in each way: a decode step of 32 layers without compute.

    python benchmarks/bench_calls.py

Every size is 1 or 2, so the kernels do almost nothing and what remains is the call: Python and
pybind11 for direct calls; MindSpore's PyNative pipeline or a compiled graph for graph ops. One
token, one sequence, one key. The best of all repetitions counts, because other programs disturb
MindSpore's threads. `MS_DEV_RUNTIME_CONF` is set to `graph_pipeline:false` unless the environment
sets it; set it to nothing to measure MindSpore's default.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

os.environ.setdefault("MS_DEV_RUNTIME_CONF", "graph_pipeline:false")  # before MindSpore is imported

import mindspore
import numpy as np

from codellama_rt import _core, ops
from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.model.llama import Llama
from codellama_rt.model.llama_graph import LlamaCell
from codellama_rt.model.weights import LayerWeights, LlamaWeights
from codellama_rt.ops.schema import OPS, Op
from codellama_rt.tools.bench.measure import Timing, save
from codellama_rt.tools.bench.op_arrays import bind, make_arrays
from codellama_rt.tools.bench.op_cases import BLOCK_SIZE, Case

N_LAYERS = 32
CONFIG = ModelConfig(
    n_layers=N_LAYERS, n_heads=1, n_kv_heads=1, head_dim=2, dim=2, hidden_dim=1, vocab_size=2
)
SIZES = {
    "num_tokens": 1,
    "num_seqs": 1,
    "num_keys": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "head_dim": 2,
    "num_blocks": 2,
    "block_size": BLOCK_SIZE,
    "max_blocks": 2,
    "num_positions": 1,
    "num_pairs": 1,
    "vocab_size": 2,
    "dim": 2,
    "hidden_dim": 1,
    "in_features": 2,
    "out_features": 1,
}
CALL_GOAL_US = 1.0  # for a direct call


def make_weights() -> LlamaWeights:
    """Return weights of ones: the values do not matter, but they must stay finite."""

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    layers = [
        LayerWeights(
            attention_norm=ones(2),
            q_proj=ones(2, 2),
            k_proj=ones(2, 2),
            v_proj=ones(2, 2),
            o_proj=ones(2, 2),
            mlp_norm=ones(2),
            gate_proj=ones(1, 2),
            up_proj=ones(1, 2),
            down_proj=ones(2, 1),
        )
        for _ in range(N_LAYERS)
    ]
    return LlamaWeights(ones(2, 2), layers, ones(2), ones(2, 2))


def make_batch() -> Batch:
    """Return a batch of the first token of one sequence."""
    zero = np.zeros(1, np.int32)
    return Batch(
        token_ids=zero,
        positions=zero,
        cu_seqlens_q=np.array([0, 1], np.int32),
        seq_lens=np.ones(1, np.int32),
        block_tables=zero[None],
        slot_mapping=zero,
        logit_rows=zero,
    )


def whole_layers(model: Llama, batch: Batch, kv_cache: KVCache) -> np.ndarray:
    """Compute `Llama.forward` with one direct call per layer."""
    weights, eps = model.weights, model.config.norm_eps
    cos, sin, index = model.rope.lookup(batch.positions)
    x = ops.embedding(batch.token_ids, weights.embedding)
    for layer, caches in zip(weights.layers, kv_cache.layers, strict=True):
        ops.decoder_layer(
            x,
            *vars(layer).values(),
            cos,
            sin,
            index,
            *caches,
            batch.slot_mapping,
            batch.block_tables,
            batch.seq_lens,
            batch.cu_seqlens_q,
            eps=eps,
            out=x,
        )
    return ops.linear(ops.rms_norm(x[batch.logit_rows], weights.norm, eps), weights.lm_head)


def steps() -> list[tuple[str, int, Callable[[], np.ndarray]]]:
    """Return the ways of calling: name, operators per step, and the step."""
    weights, batch, not_compiled = make_weights(), make_batch(), LlamaCell.construct.__wrapped__
    kv_cache = KVCache(CONFIG, num_blocks=1, block_size=16)
    model = Llama(CONFIG, weights)
    num_ops, num_whole = 9 * N_LAYERS + 4, N_LAYERS + 4
    ways = [
        ("direct", num_ops - 1, lambda: model.forward(batch, kv_cache)),
        ("direct, whole layers", num_whole - 1, lambda: whole_layers(model, batch, kv_cache)),
    ]
    for name, count in (("", num_ops), (", whole layers", num_whole)):
        cell, fixed = (
            LlamaCell(CONFIG, weights, whole_layers=bool(name)) for _ in range(2)
        )  # `fixed` is never told that sizes vary
        tensors = cell.inputs(batch, kv_cache)
        ways += [
            (f"PyNative{name}", count, lambda c=cell, t=tensors: not_compiled(c, *t).asnumpy()),
            (f"@ms.jit{name}", count, lambda c=cell, t=tensors: c(*t).asnumpy()),
            (f"@ms.jit, fixed sizes{name}", count, lambda c=fixed, t=tensors: c(*t).asnumpy()),
            (f"LlamaCell.forward{name}", count, lambda c=cell: c.forward(batch, kv_cache)),
        ]
    return ways


def time_step(step: Callable[[], object], seconds: float) -> Timing:
    """Time single steps for a while, after warming up."""
    times: list[float] = []
    for _ in range(5):
        step()
    while sum(times) < seconds or len(times) < 20:
        started = perf_counter()
        step()
        times.append(perf_counter() - started)
    return Timing(times)


def compare_steps(seconds: float) -> list[dict]:
    """Print what a step costs in each way of calling."""
    print(f"\nA decode step of {N_LAYERS} layers without compute")
    print(f"{'call':34} {'ops':>4} | {'us/step':>8} {'median':>8} | {'us/layer':>8} | {'us/op':>6}")
    rows, ways = [], steps()
    expected = ways[0][2]()
    for way, num_ops, step in ways:
        np.testing.assert_array_equal(step(), expected)
        timing = time_step(step, seconds)
        best = 1e6 * timing.best
        print(
            f"{way:34} {num_ops:4} | {best:8.1f} {1e6 * timing.median:8.1f} | "
            f"{best / N_LAYERS:8.2f} | {best / num_ops:6.2f}",
            flush=True,
        )
        rows.append({"what": "step", "call": way, "ops": num_ops, **timing.record()})
    return rows


class Recorder:
    """Replace the compiled module and record the arguments of calls."""

    args: tuple = ()

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args: setattr(self, "args", args)


def time_call(function: Callable[..., object]) -> float:
    """Return the microseconds per call of many calls, the best round of 40."""
    best = float("inf")
    for _ in range(40):
        started = perf_counter()
        for _ in range(500):
            function()
        best = min(best, perf_counter() - started)
    return 1e6 * best / 500


def call_costs(op: Op, arrays: dict[str, object]) -> tuple[float, float]:
    """Return the microseconds of a call of the op, and of the compiled function alone."""
    whole = bind(op, arrays)
    recorder = Recorder()
    with patch.object(sys.modules[getattr(ops, op.name).__module__], "_core", recorder):
        whole()
    return time_call(whole), time_call(partial(getattr(_core, op.name), *recorder.args))


def compare_calls() -> list[dict]:
    """Print what a direct call of each op costs, results preallocated."""
    print("\nA direct call without compute, us")
    print(f"{'':22} | {'NumPy arrays':^14} | {'MindSpore Tensors':^17}")
    print(f"{'op':22} | {'all':>6} {'pybind':>7} | {'all':>8} {'pybind':>8}")
    rows = []
    for op in OPS.values():
        arrays = make_arrays(Case(op, "", "", "float32", SIZES), np.random.default_rng(0))
        tensors = {name: mindspore.Tensor.from_numpy(array) for name, array in arrays.items()}
        costs = (*call_costs(op, arrays), *call_costs(op, tensors))
        print(
            f"{op.name:22} | {costs[0]:6.2f} {costs[1]:7.2f} | {costs[2]:8.2f} {costs[3]:8.2f}"
            f"{'  over 1 us from NumPy' if costs[1] > CALL_GOAL_US else ''}",
            flush=True,
        )
        rows.append({"what": "call", "op": op.name, "us": costs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per way of calling")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    ops.set_num_threads(1)
    rows = compare_steps(args.seconds) + compare_calls()
    if args.json:
        save(args.json, "calls", rows)


if __name__ == "__main__":
    main()
