"""Timings, and how they are written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles


class Timing:
    """Seconds of repeated runs of the same work."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds)

    @property
    def best(self) -> float:
        """What the machine can do: others only ever make a run longer."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def text(self) -> str:
        """Median (10th to 90th percentile), best."""
        scale, unit = (1e6, "us") if self.median < 1e-3 else (1e3, "ms")
        tenths = quantiles(self.seconds, n=10) if len(self.seconds) > 1 else 9 * self.seconds
        low, middle, high, best = (
            f"{scale * x:.4g}" for x in (tenths[0], self.median, tenths[-1], self.best)
        )
        return f"{middle} ({low}-{high}), best {best} {unit}"

    def record(self) -> dict[str, float]:
        return {"best_s": self.best, "median_s": self.median, "runs": len(self.seconds)}


def save(path: Path | None, rows: Sequence[dict]) -> None:
    """Write rows as JSON, for comparisons and plots."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")
