"""Benchmark rows of whole models: decode steps at any depth, and prompts."""

from __future__ import annotations

import contextlib
import gc
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.llm.variants import SHAPES
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.tools.bench.measure import Row, Stopwatch, Timing, drift, steadiest, stopwatch
from codellama_rt.tools.bench.runner import Runner
from codellama_rt.tools.bench.synthetic import write_directory
from codellama_rt.tools.limits import Limits, peak, read_bandwidth

_PYTHON_STEPS = 20


@dataclass(frozen=True)
class Model:
    """The model to run: an existing one, or random weights in a Code Llama's shape.

    Attributes:
        path: directory, GGUF file or name; None: write a model of `shape` and `layers`.
        shape: a name of `SHAPES`.
        layers: number of layers of the shape; None: all.
        weights: dtype of the weights.
        kv_dtype: dtype of the cache; "auto": the model's.
    """

    path: str | None = None
    shape: str = "7b"
    layers: int | None = None
    weights: str = "bfloat16"
    kv_dtype: str = "auto"

    @property
    def name(self) -> str:
        """The model's name in a row."""
        if self.path is not None:
            return Path(self.path).name
        layers = self.layers or SHAPES[self.shape].n_layers
        return f"{self.shape}, {layers} layer{'s' if layers > 1 else ''}"

    @property
    def is_whole(self) -> bool:
        """Whether it has all layers of its shape."""
        return self.path is not None or self.layers in (None, SHAPES[self.shape].n_layers)

    @contextlib.contextmanager
    def runner(self, max_depth: int) -> Iterator[Runner]:
        """Yield the model behind an engine; a model written for it is deleted at the end."""
        with tempfile.TemporaryDirectory(prefix="codellama-rt-bench-") as folder:
            path = Path(folder) / "model"
            if self.path is None:
                config = SHAPES[self.shape]
                config = replace(config, n_layers=self.layers or config.n_layers)
                write_directory(path, config, dtype=self.weights)
            yield Runner(open_checkpoint(self.path or path, repack=True), max_depth, self.kv_dtype)


def decode_row(
    model: Model,
    runner: Runner,
    depth: int,
    steps: int,
    *,
    limits: Limits,
    python_share: bool = False,
    watch: Stopwatch = stopwatch,
) -> Row:
    """Time decode steps at one depth; measure the read bandwidth before and after them."""
    runner.decode(depth, 2)  # warms up caches, threads and the weights' memory pages
    before = read_bandwidth()
    with runner.at_depth(depth, steps + 1):  # pytest-benchmark may run one more
        timing = Timing(watch(runner.step, _nothing, steps))
    after = read_bandwidth()
    roof = max(before, after)
    num_bytes = runner.decode_bytes(depth)
    share = {"python_share": runner.python_share(depth, _PYTHON_STEPS)} if python_share else {}
    return {
        "what": "decode",
        **_about(model, runner, limits),
        "depth": depth,
        **timing.record(),
        "tokens_per_s": 1 / timing.median,
        "bytes": num_bytes,
        "gb_per_s": num_bytes / timing.median / 1e9,
        "share": num_bytes / timing.median / roof,
        "best_share": num_bytes / timing.best / roof,
        "read_gb_per_s": roof / 1e9,
        "roof_drift": drift(before, after),
        **share,
    }


def prefill_row(
    model: Model,
    runner: Runner,
    num_tokens: int,
    repeats: int,
    *,
    limits: Limits,
    watch: Stopwatch = stopwatch,
) -> Row:
    """Time prompts of one length; measure the arithmetic of the weights before and after them."""
    runner.prefill(num_tokens)
    weights = runner.weights_dtype
    products = weights if weights in FLOAT_DTYPES else "int8"
    _, before = peak(products)
    timing = Timing(watch(runner.run_prompt, lambda: runner.add_prompt(num_tokens), repeats))
    instruction, after = peak(products)
    rate, roof = runner.prefill_flops(num_tokens) / timing.median, max(before, after)
    return {
        "what": "prefill",
        **_about(model, runner, limits),
        "tokens": num_tokens,
        **timing.record(),
        "tokens_per_s": num_tokens / timing.median,
        "gflop_per_s": rate / 1e9,
        "instruction": instruction,
        "peak_gflop_per_s": roof / 1e9,
        "share": rate / roof,
        "roof_drift": drift(before, after),
    }


def generate_rows(
    models: Sequence[Model],
    depths: Sequence[int],
    prefills: Sequence[int],
    *,
    steps: int,
    repeats: int,
    limits: Limits,
    python_share: bool = False,
) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows as (done, total, row); one whose limit moved is measured again."""
    time_decode = partial(decode_row, steps=steps, limits=limits, python_share=python_share)
    time_prefill = partial(prefill_row, repeats=repeats, limits=limits)
    done, total = 0, len(models) * (len(depths) + len(prefills))
    for model in models:
        with model.runner(max([*depths, *prefills])) as runner:
            for depth in depths:
                done += 1
                yield done, total, steadiest(partial(time_decode, model, runner, depth))
            for count in prefills:
                done += 1
                yield done, total, steadiest(partial(time_prefill, model, runner, count))
        del runner  # frees its cache before the next one is allocated
        gc.collect()


def _about(model: Model, runner: Runner, limits: Limits) -> Row:
    """Return what was measured, and the process's memory, including mapped weights."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return {
        "model": model.name,
        "layers": runner.config.n_layers,
        "is_whole": model.is_whole,
        "weights": runner.weights_dtype,
        "kv": runner.kv_dtype,
        "isa": limits.isa,
        "threads": ops.num_threads(),
        "rss_gb": resident / 1e9,
    }


def _nothing() -> None:
    """Do nothing: decode steps need no setup."""
