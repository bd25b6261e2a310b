"""The plots of a report: a roofline of operators, tokens per second over the context length.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; markers and dashes
repeat the distinction.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKS = ["o", "s", "^", "D", "v", "P", "X", "*"]
SIZE = (11, 5.4)  # inches


def plot_all(rows, folder):
    """Write the plots for which there are rows, as SVG."""
    ops = [row for row in rows if row["what"] == "op" and row["flops"] and row["bound"] != "call"]
    steps = [row for row in rows if row["what"] == "decode"]
    for name, of_kind, draw in (("roofline", ops, roofline), ("context", steps, context)):
        if not of_kind:
            continue
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        draw(axes, of_kind)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})  # same rows, same file
        plt.close(figure)


def roofline(axes, rows):
    """Plot GFLOP/s over FLOP per byte, below the limits of memory and arithmetic."""
    at = [row["flops"] / row["bytes"] for row in rows]
    span = [min(at) / 2, max(at) * 2]
    reads = [row["read_gb_per_s"] for row in rows]
    peak = max(row["peak_gflop_per_s"] for row in rows)
    knees = [peak / read for read in (max(reads), min(reads))]
    edge = [span[0], *(x for x in knees if span[0] < x < span[1]), span[1]]
    low, high = ([min(x * read, peak) for x in edge] for read in (min(reads), max(reads)))
    axes.fill_between(edge, low, high, color="#bbbbbb", alpha=0.5, linewidth=0)
    axes.plot(edge, high, color="#555555", label=f"read {min(reads):.0f}-{max(reads):.0f} GB/s")
    for i, (dtype, flops) in enumerate(sorted(_peaks(rows).items(), key=lambda item: -item[1])):
        axes.plot(
            span,
            [flops, flops],
            color="#555555",
            linestyle=["-", "--", ":", "-."][i % 4],
            linewidth=1,
            label=f"{flops:.0f} GFLOP/s, {dtype}",
        )
    groups = sorted({(row["op"], row["dtype"]) for row in rows})
    ops = sorted({op for op, _ in groups})
    dtypes = sorted({dtype for _, dtype in groups})
    for op, dtype in groups:
        points = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in points],
            [row["gflop_per_s"] for row in points],
            s=28,
            alpha=0.85,
            color=COLOURS[ops.index(op) % len(COLOURS)],
            marker=MARKS[dtypes.index(dtype) % len(MARKS)],
            label=f"{op}, {dtype}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte",
        ylabel="GFLOP/s (median)",
        title=f"Operators under the limits of this machine ({_machine(rows)})",
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def context(axes, rows):
    """Plot tokens per second over the context length; dashed: the limit of the read bandwidth."""
    series = {}
    for row in rows:
        label = f"{row['model']}: {row['weights']} weights, {row['kv']} cache"
        series.setdefault(label, {})[row["depth"]] = 1e6 / row["median_us"]
        if "peer" in row:
            peer = f"{row['model']}: {row['peer']}"
            series.setdefault(peer, {})[row["depth"]] = 1e6 / row["peer_median_us"]
    roofs = {}
    for row in (row for row in rows if "bytes" in row):
        label = f"{row['model']}: {row['weights']} weights, {row['kv']} cache"
        roofs.setdefault(label, {})[row["depth"]] = 1e9 * row["read_gb_per_s"] / row["bytes"]
    lines = {label: points for label, points in series.items() if len(points) > 1}
    for i, (label, points) in enumerate((lines or series).items()):  # single points say little
        cycle = i // len(COLOURS)  # repeated colours have other, hollow markers
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[(i + 3 * cycle) % len(MARKS)]
        depths = sorted(points)
        axes.plot(
            depths,
            [points[d] for d in depths],
            color=colour,
            marker=mark,
            label=label,
            markerfacecolor="white" if cycle else colour,
        )
        if label in roofs:
            axes.plot(
                depths,
                [roofs[label][d] for d in depths],
                color=colour,
                linestyle="--",
                linewidth=1,
                alpha=0.7,
            )
    reads = [row["read_gb_per_s"] for row in rows]
    axes.plot(
        [],
        [],
        color="#555555",
        linestyle="--",
        label=f"allowed by {min(reads):.0f}-{max(reads):.0f} GB/s read",
    )
    depths = sorted({row["depth"] for row in rows})
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="tokens/s (median)",
        title=f"Decoding, one sequence ({rows[0]['threads']} threads)",
    )
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _peaks(rows):
    """Return the highest peak measured for each dtype of products."""
    peaks = {}
    for row in rows:
        name = row["product_dtype"]
        peaks[name] = max(peaks.get(name, 0), row["peak_gflop_per_s"])
    return peaks


def _machine(rows):
    return ", ".join(sorted({f"{row['isa']}, {row['threads']} threads" for row in rows}))
