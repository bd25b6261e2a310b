"""Time this runtime and llama.cpp, Transformers or CTranslate2 in turn.

    python benchmarks/bench_peers.py --peer-python PYTHON [--weights bfloat16,int8,int4] [--quick]

Lists are separated by commas. A peer runs in the interpreter that --peer-python names. For a fair
pair build llama.cpp for this CPU:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
"""

import sys

from peers.pairs import METHOD
from peers.peer_rows import PEERS, Work, peer_rows, settings
from scripts import follow, names, new_parser, numbers

from codellama_rt import ops
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.limits import measure_limits

QUICK = {"shape": "tiny", "layers": 2, "depth": [600], "prefill": [64], "rounds": 2, "steps": 2}


def parse(words):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--peer", type=names, default=["llama.cpp"], metavar="LIST", help=", ".join(PEERS))
    add("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter with the peer")
    add("--shape", choices=SHAPES, default="7b")
    add("--layers", type=int, default=4, metavar="N", help="of the model less one layer")
    add("--weights", type=names, default=["bfloat16"], metavar="LIST", help="dtypes")
    add("--kv-dtype", type=names, default=["bfloat16"], metavar="LIST", help="of the caches")
    add("--depth", type=numbers, default=[512, 4096, 16384], metavar="LIST", help="of decode steps")
    add("--attention", type=numbers, default=[], metavar="LIST", help="depths of attention alone")
    add("--prefill", type=numbers, default=[512], metavar="LIST", help="tokens of prompts")
    add("--rounds", type=int, default=10, metavar="N", help="turns of each side")
    add("--steps", type=int, default=10, metavar="N", help="decode steps per turn")
    add("--threads", type=int, metavar="N", help="of each operator")
    args = parser.parse_args(words)
    if args.quick:
        vars(args).update(QUICK, attention=[1024] if args.attention else [])
    return args


def main():
    args = parse(sys.argv[1:])
    if args.threads is not None:
        ops.set_num_threads(args.threads)
    print(measure_limits().describe(), METHOD, sep="\n", file=sys.stderr, flush=True)
    follow("peers", rows(args), args.json)


def rows(args):
    """Yield the rows that the options ask for."""
    chosen = settings(args.peer, args.weights, args.kv_dtype)
    work = Work(args.depth, args.attention, args.prefill, args.rounds, args.steps)
    place = {"python": args.peer_python, "shape": args.shape, "layers": args.layers}
    yield from peer_rows(chosen, work, **place)


if __name__ == "__main__":
    main()
