"""Make tables and plots from files of `codellama-rt bench` or `pytest --benchmark-json`.

    python benchmarks/report.py ops.json generate.json peers.json --out docs

Writes measurements.md and, if the files contain their rows, roofline.svg (operators) and
context.svg (tokens per second over the length of the context). Needs the extra `bench`.
"""

import argparse
import sys
from pathlib import Path

from codellama_rt.tools.bench.measure import doubt
from codellama_rt.tools.bench.records import read_record
from codellama_rt.tools.bench.tables import left_out, tables


def markdown(records):
    """Return all tables, the commands behind them and the CPU."""
    rows = [row for record in records for row in record.rows]
    cpus = list(dict.fromkeys(record.cpu for record in records))
    lines = ["# Measurements", "", f"Measured on {', '.join(cpus)} by", ""]
    lines += [f"    {record.command}" for record in records]
    lines += ["", "The limits were measured beside each row, in the same run. `+-` is half of the"]
    lines += [
        "10th to 90th percentile. A row whose limit moved by over 15 %, or that exceeds 105 %"
    ]
    lines += ["of it, is left out and listed at the end.", ""]
    for title, names, cells in tables(rows):
        lines += [f"## {title}", "", table_line(names), table_line(["---"] * len(names))]
        lines += [table_line(line) for line in cells] + [""]
    if missing := left_out(rows):
        lines += ["## Left out", "", *(f"* {line}" for line in missing), ""]
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
        records = [read_record(path) for path in args.json]
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    rows = [row for record in records for row in record.rows if doubt(row) is None]
    if not rows:
        sys.exit("report.py: there are no rows in these files")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "measurements.md").write_text(markdown(records))
    plots.plot_all(rows, args.out)


if __name__ == "__main__":
    main()
