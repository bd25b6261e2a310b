"""What the scripts of this folder share: lists on the command line, and how rows are followed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from codellama_rt.cli.progress import ProgressBar
from codellama_rt.tools.bench.measure import Row, save
from codellama_rt.tools.bench.tables import brief, show


def names(text: str) -> list[str]:
    """Return the words of a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[int]:
    """Return the numbers of such a list."""
    return [int(name) for name in names(text)]


def new_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser of a script, with the options that all have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few runs: check that it works"
    )
    return parser


def parsed(
    parser: argparse.ArgumentParser, words: list[str], quick: dict[str, object]
) -> argparse.Namespace:
    """Return the arguments; those of `quick` replace them with --quick."""
    args = parser.parse_args(words)
    if args.quick:
        vars(args).update(quick)
    return args


def follow(what: str, rows: Iterator[tuple[int, int, Row]], json: Path | None) -> None:
    """Show progress, then the tables, and save; what was measured before an error is not lost."""
    script, found = f"bench_{what}.py", []
    try:
        with ProgressBar(what) as bar:
            for done, total, row in rows:
                found.append(row)
                bar.update(done, total, brief(row))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{script}: {error}")
    finally:
        show(found)
        if json is not None:
            save(json, what, found, f"python benchmarks/{script}")
