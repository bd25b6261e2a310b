"""Timings, the rows made from them, and the files of rows."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np

from codellama_rt import __version__, ops
from codellama_rt.tools.limits import cpu_name

MOST_DRIFT = 0.15  # of a limit between before and after a row
MOST_SHARE = 1.05  # of a limit
_ATTEMPTS = 3

Row = dict[str, Any]
# Seconds of each of `rounds` runs of `work`; `setup` runs before each and is not timed.
Stopwatch = Callable[[Callable[[], object], Callable[[], object], int], list[float]]


class Timing:
    """Seconds of repeated runs of the same work."""

    def __init__(self, seconds: Sequence[float]) -> None:
        """Take the seconds of each run."""
        self.seconds = list(seconds)
        tenths = quantiles(seconds, n=10, method="inclusive") if len(self.seconds) > 1 else None
        self.low, self.high = (tenths[0], tenths[-1]) if tenths else 2 * self.seconds

    @property
    def best(self) -> float:
        """The shortest run: noise from other processes only makes runs longer."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median run: what users see."""
        return median(self.seconds)

    def text(self) -> str:
        """Return median (10th to 90th percentile) and best as text."""
        scale, unit = (1e6, "us") if self.median < 1e-3 else (1e3, "ms")
        low, middle, high, best = (
            f"{scale * x:.4g}" for x in (self.low, self.median, self.high, self.best)
        )
        return f"{middle} ({low}-{high}), best {best} {unit}"

    def record(self) -> dict[str, float]:
        """Return the fields of a row."""
        return {
            "median_us": 1e6 * self.median,
            "p10_us": 1e6 * self.low,
            "p90_us": 1e6 * self.high,
            "best_us": 1e6 * self.best,
            "runs": len(self.seconds),
        }


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = perf_counter()
    work()
    return perf_counter() - started


def stopwatch(work: Callable[[], object], setup: Callable[[], object], rounds: int) -> list[float]:
    """Run the plain `Stopwatch`; the files of `benchmarks/` use pytest-benchmark's instead."""
    seconds = []
    for _ in range(rounds):
        setup()
        seconds.append(seconds_of(work))
    return seconds


def drift(before: float, after: float) -> float:
    """Return how far a limit moved, as a share of its higher value."""
    return abs(before - after) / max(before, after)


def doubt(row: Row) -> str | None:
    """Return why a row is no result, mostly a limit that moved; None: it is one."""
    if min(row.get("median_us", 1.0), row.get("peer_median_us", 1.0)) <= 0.0:
        return "noise was more than the difference of two models"
    if row.get("roof_drift", 0.0) > MOST_DRIFT:
        return f"the limit moved by {row['roof_drift']:.0%}"
    if row.get("share", 0.0) > MOST_SHARE:
        return f"{row['share']:.0%} of the limit"
    return None


def steadiest(measure: Callable[[], Row]) -> Row:
    """Measure a row again while there is doubt, a few times; the last one counts."""
    for _ in range(_ATTEMPTS - 1):
        if doubt(row := measure()) is None:
            return row
    return measure()


def about() -> dict[str, Any]:
    """Return what a file of rows names: the CPU, how it was used, the versions."""
    return {
        "cpu": cpu_name(),
        "isa": ops.isa(),
        "threads": ops.num_threads(),
        "version": __version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def save(path: Path, what: str, rows: Sequence[Row], program: str = "codellama-rt") -> None:
    """Write rows as JSON, with the CPU, versions and command they were measured with.

    Args:
        path: the file.
        what: what was measured.
        rows: the measurements.
        program: the command line up to its arguments.
    """
    record = {
        "bench": what,
        "command": _command(program, sys.argv[1:]),
        **about(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _command(program: str, words: Sequence[str]) -> str:
    """Return the command line without file and interpreter names, which depend on the machine."""
    text = re.sub(r" --json[ =]\S+", "", f"{program} {shlex.join(words)}")
    return re.sub(r"--peer-python[ =]\S+", "--peer-python PYTHON", text)
