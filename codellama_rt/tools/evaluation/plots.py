"""Plot the results of an evaluation to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bars of scores, perplexity over context, or retrieval over length and depth.

    Args:
        result: returned by one of the evaluations.
        path: .png, .svg or .pdf.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not support the file type.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'codellama_rt[eval]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw = {"perplexity": _curve, "needle": _heatmap}.get(result["task"], _bars)
    draw(figure, axes, result)
    axes.set_title(f"{result['task']}, {result.get('model', '')}".rstrip(", "))
    figure.savefig(path, dpi=150)


def _bars(figure: Any, axes: Any, result: dict[str, Any]) -> None:
    bars = axes.bar(list(result["scores"]), list(result["scores"].values()))
    axes.bar_label(bars, fmt="{:.3f}")
    axes.set_ylim(0, 1)


def _curve(figure: Any, axes: Any, result: dict[str, Any]) -> None:
    points = result["curve"]
    before = [point["tokens_before"] for point in points]
    axes.plot(before, [point["perplexity"] for point in points], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before, up to")
    axes.set_ylabel("perplexity")


def _heatmap(figure: Any, axes: Any, result: dict[str, Any]) -> None:
    lengths, depths = result["settings"]["lengths"], result["settings"]["depths"]
    found = {(cell["length"], cell["depth"]): cell["found"] for cell in result["grid"]}
    values = [[found[length, depth] for length in lengths] for depth in depths]
    image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the key")
    figure.colorbar(image, label="keys found")
