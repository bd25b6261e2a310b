"""`codellama-rt bench ops | generate`: a progress bar, a table, and JSON for reports.

The limits of the machine, measured in the same run, go to stderr and beside each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama_rt.cli.errors import reported_errors, tell

if TYPE_CHECKING:
    from codellama_rt.tools.limits import Limits

bench_app = typer.Typer(help="Measure speed against the limits of this machine.",
                        no_args_is_help=True, rich_markup_mode=None)  # fmt: skip
_LIST = "separated by commas"
Json = Annotated[Path | None, typer.Option(help="Write the rows there as JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads of each operator.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few runs: does it work?")]
Debug = Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")]
Shape = Annotated[str, typer.Option(help="7b, 13b, 34b, 70b or tiny.")]


@bench_app.command("ops")
def bench_ops(
    op: Annotated[str, typer.Option(help=f"These alone, {_LIST}.")] = "",
    shape: Annotated[str, typer.Option(help=f"Models, {_LIST}.")] = "7b",
    dtype: Annotated[str, typer.Option(help=f"Of weights and cache, {_LIST}.")] = "bfloat16",
    isa: Annotated[str, typer.Option(help=f"Instruction sets, {_LIST}; or all.")] = "",
    tokens: Annotated[str, typer.Option(help=f"Of a step, {_LIST}.")] = "1,16,512",
    keys: Annotated[str, typer.Option(help=f"That attention reads, {_LIST}.")] = (
        "2048,16384,100000"
    ),
    seconds: Annotated[float, typer.Option(help="Spent on each row.")] = 0.5,
    threads: Threads = None, json: Json = None, quick: Quick = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Every operator at Code Llama's shapes."""
    with reported_errors(debug):
        from codellama_rt import ops
        from codellama_rt.tools.bench.op_cases import Selection
        from codellama_rt.tools.bench.op_rows import op_rows

        _prepare(threads)
        isas = ops.available_isas() if isa == "all" else _names(isa) or [ops.isa()]
        sizes = ((1, 16), (128,)) if quick else (_numbers(tokens), _numbers(keys))
        models = ("tiny",) if quick else _names(shape)
        selection = Selection(_names(op), models, _names(dtype), *sizes)
        _follow("ops", op_rows(selection, isas, 0.01 if quick else seconds), json)


@bench_app.command("generate")
def bench_generate(
    model: Annotated[
        str | None, typer.Option(help="Directory, GGUF file or name, instead of random weights.")
    ] = None,
    shape: Shape = "7b",
    layers: Annotated[int | None, typer.Option(help="Of --shape; all by default.")] = None,
    weights: Annotated[str, typer.Option(help=f"Of --shape, {_LIST}.")] = "bfloat16",
    kv_dtype: Annotated[str, typer.Option(help=f"Of the cache, {_LIST}.")] = "auto",
    depth: Annotated[str, typer.Option(help=f"Of decode steps, {_LIST}.")] = "1024,4096,16384",
    prefill: Annotated[str, typer.Option(help=f"Tokens of prompts, {_LIST}.")] = "",
    steps: Annotated[int, typer.Option(help="Decode steps a depth.")] = 32,
    repeats: Annotated[int, typer.Option(help="Prompts a length.")] = 5,
    python_share: Annotated[
        bool, typer.Option("--python-share", help="Also what Python takes of a step.")
    ] = False,
    threads: Threads = None, json: Json = None, quick: Quick = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Decode and prefill speed of a model at any context.

    A context is not computed but made up: the pages hold noise. Speed does not depend on it.
    """
    with reported_errors(debug):
        from codellama_rt.tools.bench.generate_rows import Model, generate_rows

        limits = _prepare(threads)
        if quick:
            shape, layers, depth, prefill, steps, repeats = "tiny", None, "256", "64", 4, 2
        pairs = [(w, kv) for w in _names(weights) for kv in _names(kv_dtype)]
        models = [Model(model, shape, layers, w, kv) for w, kv in pairs]
        rows = generate_rows(
            models, _numbers(depth), _numbers(prefill), steps=steps, repeats=repeats,
            limits=limits, python_share=python_share,
        )  # fmt: skip
        _follow("generate", rows, json)


def _prepare(threads: int | None) -> Limits:
    """Set the threads, then measure and tell what the machine gives to them."""
    from codellama_rt import ops
    from codellama_rt.tools.limits import measure_limits

    if threads is not None:
        ops.set_num_threads(threads)
    limits = measure_limits()
    tell(limits.describe())
    return limits


def _follow(what: str, rows: Iterator, json: Path | None) -> None:
    """Show progress, then the table; what was measured before an interrupt is not lost."""
    from codellama_rt.cli.progress import ProgressBar
    from codellama_rt.tools.bench.measure import save
    from codellama_rt.tools.bench.tables import brief, show

    found = []
    try:
        with ProgressBar(f"bench {what}") as bar:
            for done, total, row in rows:
                found.append(row)
                bar.update(done, total, brief(row))
    finally:
        show(found)
        if json is not None:
            save(json, what, found)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from None
