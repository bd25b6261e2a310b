"""Two files of rows side by side: before and after a change, or two machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from codellama_rt.tools.bench.measure import MOST_DRIFT, Row, doubt, drift
from codellama_rt.tools.bench.records import Record
from codellama_rt.tools.bench.tables import number

_WHAT = (
    *("what", "op", "shape", "model", "weights", "kv", "dtype", "depth", "tokens", "sequences"),
    "peer",
)
_SET = ("isa", "threads")  # part of a row's name only where one file has several
_ABOUT = ("cpu", "isa", "threads", "version", "numpy", "python")
# Of one of these limits each row is a share.
_ROOFS = {"memory": "read_gb_per_s", "compute": "peak_gflop_per_s"}


def compare_records(before: Record, after: Record) -> list[Row]:
    """Return a row for each that both files have; of repeated rows the last counts.

    A row has `name`, `before_us` and `after_us` (medians), `ratio` (before / after: over 1, the
    second file is faster), `best_ratio` (of the shortest runs), `roof_ratio` (the limit in the
    second file / in the first) and `doubt`: None, or why the ratio is no result.
    """
    names = [*_WHAT, *(key for key in _SET if _varies(key, before.rows, after.rows))]
    old, new = ({_key(row, names): row for row in record.rows} for record in (before, after))
    return [_pair(_name(key, names), old[key], new[key]) for key in old if key in new]


def differences(before: Record, after: Record) -> Iterator[str]:
    """Yield a line for each respect in which the two files' machines differ."""
    for key in _ABOUT:
        one, other = (record.about.get(key, "not named") for record in (before, after))
        if one != other:
            yield f"{key}: {one} before, {other} after"


def comparison_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells; a ratio in doubt is marked with a question mark."""
    cells = [
        [
            row["name"],
            number(row["before_us"]),
            number(row["after_us"]),
            f"{row['ratio']:.2f}{'?' if row['doubt'] else ''}",
            f"{row['best_ratio']:.2f}" if "best_ratio" in row else "",
            f"{row['roof_ratio']:.2f}" if "roof_ratio" in row else "",
        ]
        for row in rows
    ]
    return ["row", "before us", "after us", "ratio", "of best", "limit"], cells


def _pair(name: str, before: Row, after: Row) -> Row:
    row = {
        "name": name,
        "before_us": _microseconds(before),
        "after_us": _microseconds(after),
        "ratio": _microseconds(before) / _microseconds(after),
    }
    if "best_us" in before and "best_us" in after:
        row["best_ratio"] = before["best_us"] / after["best_us"]
    old, new = _roof(before), _roof(after)
    if old and new:
        row["roof_ratio"] = new / old
    reasons = [
        *(f"before: {reason}" for reason in [doubt(before)] if reason),
        *(f"after: {reason}" for reason in [doubt(after)] if reason),
    ]
    if old and new and drift(old, new) > MOST_DRIFT:
        reasons.append(f"the limit was {new / old:.2f} times that of before")
    return row | {"doubt": "; ".join(reasons) or None}


def _microseconds(row: Row) -> float:
    return row["median_us"] if "median_us" in row else 1e6 * row["seconds"]


def _roof(row: Row) -> float | None:
    """Return the limit that the row was held against."""
    if row.get("bound") == "call":
        return None
    is_read = row.get("bound") == "memory" or "peak_gflop_per_s" not in row
    return row.get(_ROOFS["memory" if is_read else "compute"])


def _varies(key: str, *files: Sequence[Row]) -> bool:
    return any(len({row.get(key) for row in rows}) > 1 for rows in files)


def _key(row: Row, names: Sequence[str]) -> tuple:
    return tuple(row.get(name) for name in names)


def _name(key: Sequence, names: Sequence[str]) -> str:
    """Return the words of a row's name; numbers that say little alone with theirs."""
    numbered = ("depth", "tokens", "sequences", "threads")
    words = dict(zip(names, key, strict=True))
    if words["what"] == "op":  # its shape says the tokens
        words |= {"what": None, "tokens": None}
    return " ".join(
        f"{name} {value}" if name in numbered else str(value)
        for name, value in words.items()
        if value is not None
    )
