"""What this machine gives: the roof of every other figure.

    python benchmarks/limits.py [--threads N] [--isa NAME] [--seconds S] [--json FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from measure import save

from codellama_rt import ops
from codellama_rt.limits import Limits, measure_limits


def describe(limits: Limits) -> str:
    """One line."""
    flops = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in limits.flops.items())
    return (
        f"{limits.isa}, {limits.num_threads} threads: "
        f"read {limits.read_bandwidth / 1e9:.1f} GB/s; GFLOP/s: {flops}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", choices=ops.available_isas(), nargs="*", default=[ops.isa()])
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each limit")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        ops.set_num_threads(args.threads)
    rows = []
    for isa in args.isa:
        ops.set_isa(isa)
        limits = measure_limits(args.seconds)
        print(describe(limits))
        rows.append(asdict(limits))
    save(args.json, rows)


if __name__ == "__main__":
    main()
