"""`codellama-rt bench ops | generate | serve | compare`: progress, tables, and JSON for reports.

The limits of the machine, measured in the same run, go to stderr and beside each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from codellama_rt.cli.errors import reported_errors, tell
from codellama_rt.cli.options import DebugOption

if TYPE_CHECKING:
    from codellama_rt.tools.limits import Limits

bench_app = typer.Typer(
    help="Measure speed against the limits of this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_LIST = "separated by commas"
_WEIGHTS = "bfloat16, float16, float32, int8 or int4"
_CACHES = "auto, bfloat16, float16, float32, int8 or int4"
ShapeName = Literal["7b", "13b", "34b", "70b", "tiny"]
Json = Annotated[Path | None, typer.Option(help="Write the rows to this file as JSON.")]
Threads = Annotated[int | None, typer.Option(help="Threads per operator (default: all CPUs).")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Take small sizes and few runs, to see that it works.")
]
Shape = Annotated[ShapeName, typer.Option(help="Size of Code Llama; its weights are random.")]


@bench_app.command("ops")
def bench_ops(
    op: Annotated[str, typer.Option(help=f"Operators, {_LIST} (default: all).")] = "",
    shape: Annotated[
        str, typer.Option(help=f"Sizes of Code Llama: 7b, 13b, 34b, 70b or tiny, {_LIST}.")
    ] = "7b",
    dtype: Annotated[
        str, typer.Option(help=f"Dtypes of weights and cache: {_WEIGHTS}, {_LIST}.")
    ] = "bfloat16",
    isa: Annotated[
        str, typer.Option(help=f"Instruction sets, {_LIST}, or all (default: the best here).")
    ] = "",
    tokens: Annotated[str, typer.Option(help=f"Tokens per step, {_LIST}.")] = "1,16,512",
    keys: Annotated[str, typer.Option(help=f"Keys that attention reads, {_LIST}.")] = (
        "2048,16384,100000"
    ),
    seconds: Annotated[float, typer.Option(help="Seconds spent per row.")] = 0.5,
    threads: Threads = None,
    json: Json = None,
    quick: Quick = False,
    debug: DebugOption = False,
) -> None:
    """Measure every operator at Code Llama's shapes."""
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
        str | None,
        typer.Option(help="Directory, GGUF file or name, instead of --shape's random weights."),
    ] = None,
    shape: Shape = "7b",
    layers: Annotated[int | None, typer.Option(help="Layers of --shape (default: all).")] = None,
    weights: Annotated[
        str, typer.Option(help=f"Weights of --shape: {_WEIGHTS}, {_LIST}.")
    ] = "bfloat16",
    kv_dtype: Annotated[
        str, typer.Option(help=f"Dtypes of the KV cache: {_CACHES}, {_LIST}.")
    ] = "auto",
    depth: Annotated[
        str, typer.Option(help=f"Tokens of context of the decode steps, {_LIST}.")
    ] = "1024,4096,16384",
    prefill: Annotated[str, typer.Option(help=f"Tokens per prompt, {_LIST}.")] = "",
    steps: Annotated[int, typer.Option(help="Decode steps per depth.")] = 32,
    repeats: Annotated[int, typer.Option(help="Prompts per length.")] = 5,
    python_share: Annotated[
        bool, typer.Option("--python-share", help="Also measure Python's share of a step.")
    ] = False,
    threads: Threads = None,
    json: Json = None,
    quick: Quick = False,
    debug: DebugOption = False,
) -> None:
    """Measure decode and prefill speed of a model at any context.

    The context is not computed: its blocks hold noise, on which speed does not depend.
    """
    with reported_errors(debug):
        from codellama_rt.tools.bench.generate_rows import Model, generate_rows

        limits = _prepare(threads)
        if quick:
            shape, layers, depth, prefill, steps, repeats = "tiny", None, "256", "64", 4, 2
        pairs = [(w, kv) for w in _names(weights) for kv in _names(kv_dtype)]
        models = [Model(model, shape, layers, w, kv) for w, kv in pairs]
        rows = generate_rows(
            models,
            _numbers(depth),
            _numbers(prefill),
            steps=steps,
            repeats=repeats,
            limits=limits,
            python_share=python_share,
        )
        _follow("generate", rows, json)


@bench_app.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Name to ask for (default: the server's).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CODELLAMA_RT_API_KEY", help="Key of the server.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests in all.", min=1)] = 64,
    concurrency: Annotated[
        int, typer.Option(help="Clients that ask again when they have an answer.", min=1)
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, at random times, instead of --concurrency."),
    ] = None,
    input_words: Annotated[int, typer.Option(help="Words per prompt.", min=1)] = 128,
    shared_prefix: Annotated[
        int, typer.Option(help="Words with which all prompts begin.", min=0)
    ] = 0,
    output_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=1)] = 64,
    typing: Annotated[
        bool,
        typer.Option("--typing", help="Fill gaps of one file, a request each 3 characters."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of prompts and times.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    debug: DebugOption = False,
) -> None:
    """Put a load on a server: throughput, time to the first token, time between tokens.

    The results have the names of `vllm bench serve`.
    """
    with reported_errors(debug):
        import json as json_module

        from codellama_rt.cli.progress import ProgressBar
        from codellama_rt.tools.bench.http_stream import Endpoint
        from codellama_rt.tools.bench.serving import Load, measure, table

        if rate is not None and not rate > 0:
            raise ValueError(f"--rate must be above 0, got {rate:g}")
        load = Load(
            requests=requests,
            input_words=input_words,
            shared_words=shared_prefix,
            output_tokens=output_tokens,
            concurrency=concurrency,
            rate=rate,
            typing=typing,
            model=model,
            seed=seed,
        )
        with ProgressBar("bench serve") as bar:
            found = measure(
                Endpoint(url, api_key), load, lambda *done: bar.update(*done, "answers")
            )
        print(table(found))
        if json is not None:
            json.write_text(json_module.dumps(found, indent=1) + "\n")


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="A file of rows, from --json.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    debug: DebugOption = False,
) -> None:
    """Compare the rows that two files have in common: over 1, the second file is faster.

    A ratio with a question mark is no result: one of its rows is in doubt, or the machine gave the
    two files unlike limits. The command fails if the files have no row in common.
    """
    with reported_errors(debug):
        from codellama_rt.tools.bench.compare import (
            compare_records,
            comparison_table,
            differences,
        )
        from codellama_rt.tools.bench.records import read_record
        from codellama_rt.tools.bench.tables import show_table

        records = read_record(before), read_record(after)
        rows = compare_records(*records)
        if not rows:
            raise ValueError(f"{before} and {after} have no row in common")
        for line in differences(*records):
            tell(f"Not the same: {line}")
        show_table(f"{before.name} -> {after.name}, {records[1].cpu}", *comparison_table(rows))
        for row in rows:
            if row["doubt"]:
                print(f"? {row['name']}: {row['doubt']}")


def _prepare(threads: int | None) -> Limits:
    """Set the threads, then measure and tell the limits of the machine."""
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
    from codellama_rt.tools.bench.tables import brief, left_out, show

    found = []
    try:
        with ProgressBar(f"bench {what}") as bar:
            for done, total, row in rows:
                found.append(row)
                bar.update(done, total, brief(row))
    finally:
        show(found)
        if left_out(found):
            tell(
                "Rows were left out: the machine's speed changed during the run, or a cache gave "
                "the bytes. Repeat them before using them; the file has them all."
            )
        if json is not None:
            save(json, what, found)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from None
