"""The matrix products of a layer, in turn with torch's fastest float dtype.

    python benchmarks/bench_linear.py --peer-python PYTHON [--tokens 512] [--dtype bfloat16,int8]

torch multiplies in float32, float16 and bfloat16, and the fastest of them is the peer of each of
our dtypes; one that takes over three times as long as another at a first try takes no turns.
Weights take turns on both sides and exceed every cache.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from peers.pairs import OURS, Peer, compare, take_turns
from scripts import follow, names, new_parser, numbers, parsed

from codellama_rt import ops
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench.measure import Row, stopwatch
from codellama_rt.tools.bench.op_arrays import Turns, make_arrays
from codellama_rt.tools.bench.op_cases import Case, Selection
from codellama_rt.tools.bench.op_check import check
from codellama_rt.tools.limits import measure_limits

TORCH_DTYPES = ("float32", "float16", "bfloat16")
HOPELESS = 3  # times the fastest dtype's time
WARM = 1  # runs of a turn that do not count
QUICK = {"model": "tiny", "tokens": [4], "rounds": 1, "runs": 2}


def linear_rows(args: argparse.Namespace) -> Iterator[tuple[int, int, Row]]:
    """Yield a row for each product of a layer as (done, total, row)."""
    chosen = Selection(["linear"], [args.model], args.dtype, args.tokens, [])
    cases = [case for case in chosen.cases() if not case.label.startswith("lm_head")]
    peers = {dtype: Peer(args.peer_python, "peer_torch") for dtype in TORCH_DTYPES}
    try:
        for done, case in enumerate(cases, 1):
            about = {
                "op": "linear",
                "shape": case.label,
                "model": case.model,
                "dtype": case.dtype,
                "isa": ops.isa(),
                "threads": ops.num_threads(),
                "peer": "torch",
            }
            yield done, len(cases), about | _row(case, peers, args.rounds, args.runs)
    finally:
        for peer in peers.values():
            peer.close()


def _row(case: Case, peers: dict[str, Peer], rounds: int, runs: int) -> Row:
    """Check a case, then time it in turn with each dtype of torch."""
    n, k = case.sizes["out_features"], case.sizes["in_features"]
    num_tokens, version = case.sizes["num_tokens"], ""
    for dtype, peer in peers.items():
        given = {"n": n, "k": k, "dtype": dtype, "threads": ops.num_threads()}
        version = peer.ask("open", **given)["version"]
    arrays = make_arrays(case, np.random.default_rng(0))
    check(case, arrays)
    turns = Turns(case, arrays)

    def ours() -> float:
        return median(stopwatch(turns.run, turns.advance, runs + WARM)[WARM:])

    def theirs(peer: Peer) -> float:
        answer = peer.ask("linear", num_tokens=num_tokens, runs=runs + WARM)
        return median(answer["seconds"][WARM:])

    tried = {dtype: theirs(peer) for dtype, peer in peers.items()}
    fast = [dtype for dtype in peers if tried[dtype] <= HOPELESS * min(tried.values())]
    sides = {OURS: ours} | {dtype: lambda p=peers[dtype]: theirs(p) for dtype in fast}
    row = compare(take_turns(sides, rounds), 1, None, None)
    row["gflop_per_s"] = case.flops / row["median_us"] / 1e3
    row["peer_gflop_per_s"] = case.flops / row["peer_median_us"] / 1e3
    return {"what": "linear", "tokens": num_tokens, "version": version} | row


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter with torch")
    add("--model", choices=SHAPES, default="7b")
    add("--dtype", type=names, default=["bfloat16", "float16", "int8", "int4"], metavar="LIST")
    add("--tokens", type=numbers, default=[512], metavar="LIST")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each side")
    add("--runs", type=int, default=3, metavar="N", help="products per turn")
    add("--threads", type=int, metavar="N", help="of each side")
    return parsed(parser, words, QUICK)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.threads is not None:
        ops.set_num_threads(args.threads)
    print(measure_limits().describe(), file=sys.stderr, flush=True)
    follow("linear", linear_rows(args), args.json)


if __name__ == "__main__":
    main()
