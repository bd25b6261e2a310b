"""Rows as tables, with the same columns on the terminal and in a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from codellama_rt.tools.bench.measure import Row
from codellama_rt.tools.limits import of_roof

Column = tuple[str, Callable[[Row], str]]


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield a title, a list of headings and the cells, for each kind of row present."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    for title, (columns, _) in _TABLES.items():
        if title in kinds:
            cells = [[text(row) for _, text in columns] for row in kinds[title]]
            yield title, [name for name, _ in columns], cells


def show(rows: Sequence[Row]) -> None:
    """Print the tables on stdout."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    for title, names, cells in tables(rows):
        table = Table(title=title, title_justify="left", pad_edge=False)
        for i, name in enumerate(names):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for line in cells:
            table.add_row(*line)
        console.print(table)


def brief(row: Row) -> str:
    """Return a short description of a row."""
    names = ("op", "peer", "what", "shape", "model", "weights", "dtype", "kv", "depth", "tokens")
    return " ".join(str(row[name]) for name in names if name in row)


def _kind(row: Row) -> str:
    return next(title for title, (_, matches) in _TABLES.items() if matches(row))


def _time(row: Row) -> str:
    """Return the median and the 10th to 90th percentile of the runs, in microseconds."""
    return f"{row['median_us']:.4g} ({row['p10_us']:.4g}-{row['p90_us']:.4g})"


def _share(row: Row) -> str:
    return of_roof(row["share"]) if "share" in row else ""


def _decimals(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.{digits}f}" if name in row else ""


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]}"


def _peer_work(row: Row) -> str:
    size = row.get("depth", row.get("tokens"))
    return {
        "decode": f"decode at {size}",
        "attention": f"attention alone at {size}",
        "prefill": f"prefill of {size}",
    }[row["what"]]


_READ = ("read GB/s", _decimals("read_gb_per_s", 1))
_OPS: list[Column] = [
    ("op", _text("op")),
    ("dtype", _text("dtype")),
    ("model", _text("model")),
    ("shape", _text("shape")),
    ("isa/threads", lambda r: f"{r['isa']}/{r['threads']}"),
    ("median us (p10-p90)", _time),
    ("GB/s", _decimals("gb_per_s", 1)),
    ("GFLOP/s", _decimals("gflop_per_s", 1)),
    ("bound", _text("bound")),
    ("of limit", _share),
    _READ,
    ("peak GFLOP/s", _decimals("peak_gflop_per_s", 0)),
]
_MODEL: list[Column] = [
    ("model", _text("model")),
    ("weights", _text("weights")),
    ("cache", _text("kv")),
]
_DECODE: list[Column] = [
    *_MODEL,
    ("depth", _text("depth")),
    ("median us (p10-p90)", _time),
    ("tokens/s", _decimals("tokens_per_s", 2)),
    ("GB/s", _decimals("gb_per_s", 1)),
    ("of read", _share),
    _READ,
    ("RSS GB", _decimals("rss_gb", 1)),
    ("Python", lambda r: f"{r['python_share']:.1%}" if "python_share" in r else ""),
]
_PREFILL: list[Column] = [
    *_MODEL,
    ("tokens", _text("tokens")),
    ("median us (p10-p90)", _time),
    ("tokens/s", _decimals("tokens_per_s", 1)),
    ("GFLOP/s", _decimals("gflop_per_s", 0)),
    ("of peak", _share),
    ("peak GFLOP/s", _decimals("peak_gflop_per_s", 0)),
]
_PEERS: list[Column] = [
    *_MODEL,
    ("peer", _text("peer")),
    ("work", _peer_work),
    ("ours ms", lambda r: f"{r['median_us'] / 1e3:.4g}"),
    ("peer ms", lambda r: f"{r['peer_median_us'] / 1e3:.4g}"),
    ("ratio", _decimals("ratio", 2)),
    ("best", _decimals("best_ratio", 2)),
    ("of read", _share),
    _READ,
    ("steady", lambda r: f"{r['steady']}/{r['rounds']}"),
]
_TABLES: dict[str, tuple[list[Column], Callable[[Row], bool]]] = {
    "Operators": (_OPS, lambda r: r["what"] == "op"),
    "Pairs (over 1: ours is faster)": (_PEERS, lambda r: "peer" in r),
    "Decoding": (_DECODE, lambda r: r["what"] == "decode"),
    "Prompts": (_PREFILL, lambda r: r["what"] == "prefill"),
}
