"""The limits of this machine, against which every other figure is reported.

python benchmarks/limits.py [--threads N] [--isa NAME] [--seconds S] [--json FILE]
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from codellama_rt import ops
from codellama_rt.tools.bench.measure import save
from codellama_rt.tools.limits import measure_limits, read_bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", choices=ops.available_isas(), nargs="*", default=[ops.isa()])
    parser.add_argument("--seconds", type=float, default=0.5, help="time per limit")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        ops.set_num_threads(args.threads)
    rows = []
    for isa in args.isa:
        ops.set_isa(isa)
        limits = measure_limits(args.seconds)
        small = read_bandwidth(args.seconds, huge_pages=False)
        print(f"{limits.describe()}; read in 4 KB pages {small / 1e9:.1f} GB/s")
        rows.append({"what": "limits", **asdict(limits), "small_page_bandwidth": small})
    if args.json:
        save(args.json, "limits", rows)


if __name__ == "__main__":
    main()
