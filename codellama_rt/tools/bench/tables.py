"""Rows as tables of at most 100 columns, alike on the terminal and in a report.

What all rows of a table share is in its title. Rows in doubt are left out and listed below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from codellama_rt.tools.bench.measure import Row, doubt
from codellama_rt.tools.limits import of_roof

WIDTH = 100
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True)
class _Kind:
    """One kind of row: what its tables are called, and which columns they have."""

    title: Callable[[Row], str]
    columns: list[Column]
    matches: Callable[[Row], bool]


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield a title, a list of headings and the cells of each table; without rows in doubt."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        at = next(i for i, kind in enumerate(_KINDS) if kind.matches(row))
        groups.setdefault((at, _KINDS[at].title(row)), []).append(row)
    for (at, title), members in sorted(groups.items(), key=lambda item: item[0][0]):
        columns = _KINDS[at].columns
        cells = [[text(row) for _, text in columns] for row in members if doubt(row) is None]
        if cells:
            yield title, [name for name, _ in columns], cells


def left_out(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that the tables leave out, with the reason."""
    return [f"{brief(row)}: {reason}" for row in rows if (reason := doubt(row)) is not None]


def show(rows: Sequence[Row]) -> None:
    """Print the tables on stdout."""
    for title, names, cells in tables(rows):
        show_table(title, names, cells)
    for line in left_out(rows):
        print(f"Left out: {line}")


def show_table(title: str, names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print one table on stdout."""
    import sys

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else WIDTH
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console(width=width, highlight=False, markup=False).print(table)


def brief(row: Row) -> str:
    """Return a short description of a row."""
    names = ("op", "peer", "what", "shape", "model", "weights", "dtype", "kv", "depth", "tokens")
    names += ("sequences", "threads") if row["what"] == "batch" else ()
    return " ".join(str(row[name]) for name in names if name in row)


def _spread(row: Row) -> str:
    """Return half the width of the 10th to 90th percentile, as a share of the median."""
    return f"{(row['p90_us'] - row['p10_us']) / 2 / row['median_us']:.0%}"


def _share(row: Row) -> str:
    return of_roof(row["share"]) if "share" in row else ""


def _rate(row: Row) -> str:
    """Return what the row reached, in the unit of its limit."""
    if row["bound"] == "compute":
        return f"{row['gflop_per_s']:.0f} GFLOP/s"
    return f"{row['gb_per_s']:.1f} GB/s"


def _limit(row: Row) -> str:
    if row["bound"] == "call":
        return "a call"
    if row["bound"] == "memory":
        return f"read {row['read_gb_per_s']:.1f}"
    return f"{row['instruction']} {row['peak_gflop_per_s']:.0f}"


def _decimals(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.{digits}f}" if name in row else ""


def number(value: float) -> str:
    """Return a value with four significant digits, a large one as a whole number."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _number(name: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: number(row[name] * scale) if name in row else ""


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]}"


def _machine(row: Row) -> str:
    return f"{row['isa']}, {row['threads']} threads"


def _peer_work(row: Row) -> str:
    size = row.get("depth", row.get("tokens"))
    return {
        "decode": f"decode {size}",
        "attention": f"attention {size}",
        "prefill": f"prompt {size}",
    }[row["what"]]


def _small_work(row: Row) -> str:
    if row["what"] == "prefill":
        return f"prompt {row['tokens']}"
    return f"{row['sequences']} at {row['depth']}"


_OPS: list[Column] = [
    ("op", _text("op")),
    ("shape", _text("shape")),
    ("us", _number("median_us")),
    ("+-", _spread),
    ("reached", _rate),
    ("limit", _limit),
    ("of it", _share),
]
_MODEL: list[Column] = [("weights", _text("weights")), ("cache", _text("kv"))]
_DECODE: list[Column] = [
    *_MODEL,
    ("depth", _text("depth")),
    ("ms", _number("median_us", 1e-3)),
    ("+-", _spread),
    ("tokens/s", _number("tokens_per_s")),
    ("GB/s", _decimals("gb_per_s", 1)),
    ("read", _decimals("read_gb_per_s", 1)),
    ("of it", _share),
    ("RSS GB", _decimals("rss_gb", 1)),
    ("Python", lambda r: f"{r['python_share']:.1%}" if "python_share" in r else ""),
]
_PREFILL: list[Column] = [
    *_MODEL,
    ("tokens", _text("tokens")),
    ("ms", _number("median_us", 1e-3)),
    ("+-", _spread),
    ("tokens/s", _number("tokens_per_s")),
    ("GFLOP/s", _decimals("gflop_per_s", 0)),
    ("limit", lambda r: f"{r['instruction']} {r['peak_gflop_per_s']:.0f}"),
    ("of it", _share),
]
_PROMPTS: list[Column] = [
    *_MODEL,
    ("tokens", _text("tokens")),
    ("seconds", _number("seconds")),
    ("hours", _decimals("hours", 2)),
    ("tokens/s", _number("tokens_per_s")),
    ("attention", lambda r: f"{r['attention_share']:.0%}"),
    ("limit s", _number("limit_seconds")),
    ("of it", _share),
]
_PEERS: list[Column] = [
    ("weights", _text("weights")),
    ("cache", _text("kv")),
    ("work", _peer_work),
    ("peer", _text("setting")),
    ("ms", _number("median_us", 1e-3)),
    ("peer's", _number("peer_median_us", 1e-3)),
    ("ratio", _decimals("ratio", 2)),
    ("whole", _decimals("whole_ratio", 2)),
    ("of read", _share),
    ("steady", lambda r: f"{r['steady']}/{r['rounds']}"),
]
_SMALL: list[Column] = [
    ("weights", _text("weights")),
    ("threads", _text("threads")),
    ("work", _small_work),
    ("ms", _number("median_us", 1e-3)),
    ("best peer", _text("setting")),
    ("its ms", _number("peer_median_us", 1e-3)),
    ("ratio", _decimals("ratio", 2)),
    ("steady", lambda r: f"{r['steady']}/{r['rounds']}"),
]
_SHARED: list[Column] = [
    *_MODEL,
    ("work", lambda r: f"{r['part']}, {r['sequences']} over {r['depth']}"),
    ("one ms", _number("one_us", 1e-3)),
    ("shared", _number("median_us", 1e-3)),
    ("of one", _decimals("times_one", 2)),
    ("apart", _number("apart_us", 1e-3)),
    ("gain", _decimals("gain", 2)),
    ("peer's", _number("peer_median_us", 1e-3)),
    ("ratio", _decimals("ratio", 2)),
    ("steady", lambda r: f"{r['steady']}/{r['rounds']}"),
]
_LINEAR: list[Column] = [
    ("dtype", _text("dtype")),
    ("shape", _text("shape")),
    ("ms", _number("median_us", 1e-3)),
    ("GFLOP/s", _decimals("gflop_per_s", 0)),
    ("best peer", _text("setting")),
    ("its ms", _number("peer_median_us", 1e-3)),
    ("GFLOP/s", _decimals("peer_gflop_per_s", 0)),
    ("ratio", _decimals("ratio", 2)),
    ("steady", lambda r: f"{r['steady']}/{r['rounds']}"),
]
_SPECULATION: list[Column] = [
    ("task", _text("task")),
    ("tasks", _text("tasks")),
    ("tokens/s", _number("tokens_per_s")),
    ("without", _number("without")),
    ("ratio", _decimals("ratio", 2)),
    ("least", _decimals("least_ratio", 2)),
    ("tokens per step", _decimals("tokens_per_step", 1)),
    ("accepted", lambda r: f"{r['accepted']:.0%}"),
]
_KINDS = (
    _Kind(
        lambda r: f"Speculation, in turn with one token at a time: {r['model']}",
        _SPECULATION,
        lambda r: r["what"] == "speculation",
    ),
    _Kind(
        lambda r: f"Operators: {r['model']}, {r['dtype']}, {_machine(r)}",
        _OPS,
        lambda r: r["what"] == "op",
    ),
    _Kind(
        lambda r: f"Products, in turn with {r['peer']}: {r['model']}, {_machine(r)}",
        _LINEAR,
        lambda r: r["what"] == "linear",
    ),
    _Kind(
        lambda r: f"Sequences over one prefix: {r['model']}, {_machine(r)}",
        _SHARED,
        lambda r: r["what"] == "shared",
    ),
    _Kind(
        lambda r: f"Sequences at once, in turn with peers: {r['model']}",
        _SMALL,
        lambda r: r["what"] == "batch" or ("peer" in r and "layers" not in r),
    ),
    _Kind(
        lambda r: f"Pairs per layer (over 1: ours is faster): {r['model']}, {r['peer'].split()[0]}",
        _PEERS,
        lambda r: "peer" in r,
    ),
    _Kind(
        lambda r: f"Decoding: {r['model']}, {_machine(r)}", _DECODE, lambda r: r["what"] == "decode"
    ),
    _Kind(
        lambda r: f"Prompts: {r['model']}, {_machine(r)}",
        _PREFILL,
        lambda r: r["what"] == "prefill",
    ),
    _Kind(
        lambda r: f"Whole prompts, summed from chunks: {r['model']}, {_machine(r)}",
        _PROMPTS,
        lambda r: r["what"] == "prompt",
    ),
)
