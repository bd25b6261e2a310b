"""Make tables and plots from files of `codellama-rt bench` or `pytest --benchmark-json`.

    python benchmarks/report.py ops.json generate.json peers.json --out docs

Writes measurements.md and, if the files contain their rows, roofline.svg (operators) and
context.svg (tokens per second over the length of the context). Needs the extra `bench`.
"""

import argparse
import json
import sys
from pathlib import Path

from codellama_rt.tools.bench.tables import tables


def read_rows(paths):
    """Return the rows of files of either kind, and the commands that measured them."""
    rows, commands = [], []
    for path in paths:
        record = json.loads(path.read_text())
        if "benchmarks" in record:  # pytest-benchmark's
            infos = [one["extra_info"] for one in record["benchmarks"]]
            rows += [row for info in infos for row in info.get("rows", [info])]
            commands.append(f"pytest --benchmark-json={path.name}")
        elif "rows" in record:
            rows += record["rows"]
            commands.append(record["command"])
        else:
            raise ValueError(f"{path}: neither pytest-benchmark nor `codellama-rt bench` wrote it")
    if not rows:
        raise ValueError("there are no rows in these files")
    return rows, commands


def markdown(rows, commands):
    """Return all tables, and the commands behind them."""
    lines = ["# Measurements", "", "Measured by", ""]
    lines += [f"    {command}" for command in commands]
    lines += ["", "Read bandwidth and peak were measured beside each row, in the same run.", ""]
    for title, names, cells in tables(rows):
        lines += [f"## {title}", "", table_line(names), table_line(["---"] * len(names))]
        lines += [table_line(line) for line in cells] + [""]
    return "\n".join(lines)


def table_line(cells):
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER")
    args = parser.parse_args()
    try:
        import plots
    except ImportError as error:
        sys.exit(f"report.py: {error}; install it with pip install 'codellama_rt[bench]'")
    try:
        rows, commands = read_rows(args.json)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "measurements.md").write_text(markdown(rows, commands))
    plots.plot_all(rows, args.out)


if __name__ == "__main__":
    main()
