"""The plots of a report: rooflines of operators, and whole models over the context length.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; a colour is a dtype in
every plot, and markers and dashes tell the rest apart.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from codellama_rt.tools.bench.measure import Row

COLOURS = {
    "bfloat16": "#0072B2",
    "int8": "#D55E00",
    "int4": "#009E73",
    "float16": "#CC79A7",
    "float32": "#000000",
}
OTHER_COLOURS = ["#E69F00", "#56B4E9", "#999999"]  # of GGUF formats
MARKS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8"]
DASHES = ["-", "--", ":", "-."]
GREY = "#555555"
SIZE = (11, 5.4)  # inches
ROOFLINES = (("decode: 1 token", True), ("prompts: several tokens", False))


def plot_all(rows: list[Row], folder: Path) -> None:
    """Write the plots for which there are rows, as SVG."""
    operators = [r for r in rows if r["what"] == "op" and r["flops"] and r["bound"] != "call"]
    steps = whole_steps(rows)
    if operators:
        figure, both = plt.subplots(1, 2, figsize=SIZE, layout="constrained", sharey=True)
        for axes, (title, is_decode) in zip(both, ROOFLINES, strict=True):
            members = [row for row in operators if (row["tokens"] == 1) == is_decode]
            roofline(axes, members, operators, title)
        figure.suptitle(f"Operators under the limits of this machine ({_machine(operators)})")
        handles = _one_of_each(axes.get_legend_handles_labels() for axes in both)
        figure.legend(*handles, fontsize=7, loc="outside right center")
        _save(figure, folder / "roofline.svg")
    if steps:
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        context(axes, steps)
        _save(figure, folder / "context.svg")


def roofline(axes: Axes, rows: list[Row], all_rows: list[Row], title: str) -> None:
    """Plot GFLOP/s over FLOP per byte, below the limits of memory and arithmetic.

    A mark is an operator, a colour a dtype: the same in both plots of `all_rows`.
    """
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=title)
    axes.grid(which="major", alpha=0.3)
    if not rows:
        return
    axes.set_ylabel("GFLOP/s (median)")
    at = [row["flops"] / row["bytes"] for row in rows]
    span = [min(at) / 2, max(at) * 2]
    reads = [row["read_gb_per_s"] for row in rows]
    peaks = _peaks(rows)
    top = max(peaks.values())
    edge = sorted([*span, *(x for read in reads if span[0] < (x := top / read) < span[1])])
    low, high = ([min(x * read, top) for x in edge] for read in (min(reads), max(reads)))
    axes.fill_between(edge, low, high, color="#bbbbbb", alpha=0.5, linewidth=0)
    axes.plot(edge, high, color=GREY, label="read bandwidth, lowest to highest")
    known = sorted(_peaks(all_rows))
    for name, flops in peaks.items():
        dashes = DASHES[known.index(name) % len(DASHES)]
        axes.axhline(flops, color=GREY, linestyle=dashes, linewidth=1, label=name)
    marks = sorted({row["op"] for row in all_rows})
    for op, dtype in sorted({(row["op"], row["dtype"]) for row in rows}):
        points = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in points],
            [row["gflop_per_s"] for row in points],
            s=28,
            alpha=0.85,
            color=_colour(dtype, all_rows),
            marker=MARKS[marks.index(op) % len(MARKS)],
            label=f"{op}, {dtype}",
        )


def _peaks(rows: list[Row]) -> dict[str, float]:
    """Return the highest rate measured for each instruction."""
    peaks = {}
    for row in rows:
        name = row["instruction"]
        peaks[name] = max(peaks.get(name, 0.0), row["peak_gflop_per_s"])
    return peaks


def whole_steps(rows: list[Row]) -> list[Row]:
    """Return decode steps of whole models: depth, seconds of ours, limit, perhaps the peer's.

    Of pairs by layers these are sums of the layers and the head.
    """
    found = []
    for row in rows:
        if row["what"] != "decode":
            continue
        peer = row.get("peer_whole_us")
        seconds = row.get("whole_us", row["median_us"] if row.get("is_whole") else None)
        if seconds is None:
            continue
        num_bytes = row["whole_bytes"] if peer else row["bytes"]
        step = {key: row[key] for key in ("weights", "kv", "depth", "isa", "threads")}
        step |= {"model": row["model"].split(",")[0], "layers": row["layers"], "us": seconds}
        step["limit_us"] = num_bytes / row["read_gb_per_s"] / 1e3
        found.append(step | ({"peer_us": peer, "peer": row["peer"]} if peer else {}))
    return found


def context(axes: Axes, steps: list[Row]) -> None:
    """Plot tokens per second of whole models over the context, with the limit and the peer.

    One colour per dtype of weights and cache: full lines are ours, dashed ones the peer's, dotted
    ones what the read bandwidth allows.
    """
    names = sorted({_series(step) for step in steps})
    for i, name in enumerate(names):
        members = sorted((s for s in steps if _series(s) == name), key=lambda s: s["depth"])
        colour = _series_colour(name, names, i)
        mark = MARKS[i % len(MARKS)]
        _line(axes, members, "us", color=colour, marker=mark, label=name)
        _line(axes, members, "limit_us", color=colour, linestyle=":", linewidth=1)
        theirs = [step for step in members if "peer_us" in step]
        for peer in sorted({step["peer"] for step in theirs}):
            _line(
                axes,
                [step for step in theirs if step["peer"] == peer],
                "peer_us",
                color=colour,
                linestyle="--",
                marker=mark,
                markerfacecolor="white",
                label=peer,
            )
    axes.plot([], [], color=GREY, linestyle=":", label="allowed by the read bandwidth")
    depths = sorted({step["depth"] for step in steps})
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="tokens/s (median)",
        title=f"Decoding with whole models, one sequence ({_machine(steps)})",
    )
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _line(axes: Axes, steps: list[Row], key: str, **style: object) -> None:
    axes.plot([step["depth"] for step in steps], [1e6 / step[key] for step in steps], **style)


def _series(step: Row) -> str:
    return f"{step['model']}: {step['weights']} weights, {step['kv']} cache"


def _series_colour(name: str, names: list[str], i: int) -> str:
    """Return the colour of the weights' dtype; of a later series with the same dtype another."""
    dtype = name.split(": ")[1].split()[0]
    is_first = next(other for other in names if f": {dtype} " in other) == name
    return COLOURS[dtype] if is_first and dtype in COLOURS else OTHER_COLOURS[i % 3]


def _colour(dtype: str, rows: list[Row]) -> str:
    others = sorted({row["dtype"] for row in rows} - COLOURS.keys())
    return COLOURS.get(dtype) or OTHER_COLOURS[others.index(dtype) % len(OTHER_COLOURS)]


def _one_of_each(legends) -> tuple[list, list[str]]:
    found = {}
    for handles, labels in legends:
        found |= dict(zip(labels, handles, strict=True))
    return list(found.values()), list(found)


def _machine(rows: list[Row]) -> str:
    return ", ".join(sorted({f"{row['isa']}, {row['threads']} threads" for row in rows}))


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})  # the same rows give the same file
    plt.close(figure)
