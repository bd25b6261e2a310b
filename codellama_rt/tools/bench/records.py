"""Files of rows, read again: those of `codellama-rt bench` and of `pytest --benchmark-json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama_rt.tools.bench.measure import Row


@dataclass(frozen=True)
class Record:
    """What one file says.

    Attributes:
        rows: the measurements.
        command: that made them.
        about: the CPU and the versions, as `measure.about` names them; older files lack some.
    """

    rows: list[Row]
    command: str
    about: dict[str, Any]

    @property
    def cpu(self) -> str:
        """The CPU's name."""
        return self.about.get("cpu", "an unnamed CPU")


def read_record(path: Path) -> Record:
    """Read a file of rows.

    Raises:
        OSError: it cannot be read.
        ValueError: neither pytest-benchmark nor `codellama-rt bench` wrote it.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if "benchmarks" in record:  # pytest-benchmark's
        infos = [one["extra_info"] for one in record["benchmarks"]]
        rows = [row for info in infos for row in info.get("rows", [info])]
        about = record.get("machine_info", {}).get("codellama_rt", {})
        return Record(rows, f"pytest --benchmark-json={path.name}", about)
    if "rows" in record:
        about = {key: value for key, value in record.items() if key not in ("rows", "command")}
        return Record(record["rows"], record["command"], about)
    raise ValueError(f"{path}: neither pytest-benchmark nor `codellama-rt bench` wrote it")
