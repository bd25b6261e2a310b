"""Sequences over one prefix: attended together, apart, and one alone; then steps of the engine.

    python benchmarks/bench_shared_prefix.py [--shape 7b] [--kv-dtype bfloat16,int8]
    python benchmarks/bench_shared_prefix.py --depth 32768 --peer-python PYTHON

The sequences' block tables begin with the same blocks, those of --depth tokens, and go on with
blocks of their own. Apart, they read the same blocks, but each table begins with another one of
them: no two heads are equal, so each sequence is attended by itself. All sides take turns; a ratio
is the median of those of each round. The steps are of the engine, with samples of one prompt, on
random weights of --layers layers. llama.cpp, if it is asked for (--peer-python), has a unified
cache, whose cells of the prefix belong to all sequences, as with `llama-batched-bench -pps`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from peers.pairs import Peer, Round, take_turns
from scripts import follow, names, new_parser, numbers, parsed

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.llm.variants import SHAPES
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import KVCache
from codellama_rt.tools.bench.measure import MOST_DRIFT, Row, seconds_of
from codellama_rt.tools.bench.noise import fill_caches
from codellama_rt.tools.bench.runner import BLOCK_SIZE, Runner
from codellama_rt.tools.bench.synthetic import write_directory, write_gguf
from codellama_rt.tools.limits import measure_limits

PEERS = ("llama.cpp, flash", "llama.cpp, no flash")  # in turn: the faster one is the peer
TAIL = 2 * BLOCK_SIZE  # tokens of each sequence's own
QUICK = {"shape": "tiny", "layers": 2, "depth": [1100], "kv_dtype": ["bfloat16"],
         "sequences": 3, "rounds": 1, "steps": 2}  # fmt: skip


def told_apart(tables: np.ndarray) -> np.ndarray:
    """Return block tables (num_seqs, *) whose heads differ, over the blocks of the first one."""
    others = tables.copy()
    others[:, 0] = tables[0, : len(tables)]
    return others


def attention_sides(
    config: ModelConfig, kv_dtype: str, depth: int, num_seqs: int
) -> dict[str, Callable[[], float]]:
    """Return calls of paged_attention for one sequence, and for all of them both ways."""
    rng, prefix, own = np.random.default_rng(0), depth // BLOCK_SIZE, TAIL // BLOCK_SIZE
    num_blocks = prefix + num_seqs * own
    cache = KVCache(
        replace(config, n_layers=1), num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv_dtype
    )
    fill_caches(*cache.layers[0], rng)
    blocks = rng.permutation(num_blocks).astype(np.int32)
    shared = np.tile(blocks[:prefix], (num_seqs, 1))
    tables = np.hstack([shared, blocks[prefix:].reshape(num_seqs, own)])
    query = rng.standard_normal((num_seqs, config.n_heads, config.head_dim), np.float32)
    lens = np.full(num_seqs, prefix * BLOCK_SIZE + TAIL, np.int32)

    def side(tables: np.ndarray) -> Callable[[], float]:
        count = len(tables)
        ends = np.arange(count + 1, dtype=np.int32)
        arguments = query[:count].copy(), *cache.layers[0], tables, lens[:count], ends
        return lambda: seconds_of(lambda: ops.paged_attention(*arguments))

    return {"one": side(tables[:1]), "together": side(tables), "apart": side(told_apart(tables))}


class Steps:
    """The engine with samples of one prompt, whose tables may be told apart."""

    def __init__(self, folder: Path, kv_dtype: str, depth: int, samples: int, steps: int) -> None:
        """Open the model, with `depth` tokens of noise for a prompt."""
        self.runner = Runner(open_checkpoint(folder, repack=True), depth, kv_dtype, samples)
        self.depth, self.steps, self.is_apart = depth, steps, False
        model = self.runner.model
        forward = model.forward

        def either(batch: object, cache: KVCache) -> np.ndarray:
            if self.is_apart:
                batch = replace(batch, block_tables=told_apart(batch.block_tables))
            return forward(batch, cache)

        model.forward = either

    def seconds(self, is_apart: bool) -> float:
        """Return the median seconds of a step."""
        self.is_apart = is_apart
        return median(self.runner.decode(self.depth, self.steps))


def shared_row(rounds: Sequence[Round], num_seqs: int) -> Row:
    """Return the row of `take_turns` with the sides together, apart, and perhaps one and PEERS."""
    steady = [one.turns for one in rounds if one.drift <= MOST_DRIFT]
    turns = steady or [one.turns for one in rounds]

    def over(name: str, other: str) -> float:
        return median(turn[name] / turn[other] for turn in turns)

    def middle(name: str) -> float:
        return 1e6 * median(turn[name] for turn in turns)

    row = {
        "what": "shared",
        "sequences": num_seqs,
        "median_us": middle("together"),
        "apart_us": middle("apart"),
        "gain": over("apart", "together"),
        "tokens_per_s": num_seqs * 1e6 / middle("together"),
        "read_gb_per_s": max(one.read_bandwidth for one in rounds) / 1e9,
        "roof_drift": min(one.drift for one in rounds),
        "steady": len(steady),
        "rounds": len(rounds),
    }
    if "one" in turns[0]:
        row |= {"one_us": middle("one"), "times_one": over("together", "one")}
    if PEERS[0] in turns[0]:
        best = min(PEERS, key=middle)
        row |= {"setting": best, "settings_us": {name: middle(name) for name in PEERS}}
        row |= {"peer_median_us": middle(best), "ratio": over(best, "together")}
    return row


def rows(args: argparse.Namespace, folder: Path) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows as (done, total, row): of attention, and of the engine's steps."""
    config = replace(SHAPES[args.shape], n_layers=args.layers)
    if args.layers:
        write_directory(folder / "model", config, dtype=args.weights)
    runs = [(kv, depth) for kv in args.kv_dtype for depth in args.depth]
    done, total = 0, len(runs) * (2 if args.layers else 1)
    about = {"model": args.shape, "isa": ops.isa(), "threads": ops.num_threads()}
    for kv_dtype, depth in runs:
        sides = attention_sides(config, kv_dtype, depth, args.sequences)
        found = shared_row(take_turns(sides, args.rounds), args.sequences)
        sides.clear()  # frees the cache before the next one is allocated
        run = {"kv": kv_dtype, "depth": depth}
        done += 1
        yield done, total, about | run | {"part": "attention", "weights": ""} | found
        if not args.layers:
            continue
        found = shared_row(_timed_steps(args, folder, config, kv_dtype, depth), args.sequences)
        peer = {"peer": "llama.cpp"} if args.peer_python else {}
        run |= {"part": "step", "weights": args.weights, "layers": args.layers}
        done += 1
        yield done, total, about | run | peer | found


def _timed_steps(
    args: argparse.Namespace, folder: Path, config: ModelConfig, kv_dtype: str, depth: int
) -> list[Round]:
    steps = Steps(folder / "model", kv_dtype, depth, args.sequences, args.steps)
    sides = {
        name: lambda name=name: steps.seconds(name == "apart") for name in ("together", "apart")
    }
    if not args.peer_python:
        return take_turns(sides, args.rounds)
    model = folder / "model.gguf"
    if not model.exists():
        write_gguf(model, replace(config, dtype=args.weights))
    given = {"num_seqs": args.sequences, "depth": depth, "steps": args.steps, "shared": True}
    peers = {}
    try:
        for name in PEERS:
            peer = peers[name] = Peer(args.peer_python, "peer_llamacpp")
            peer.ask("open", model=str(model), threads=ops.num_threads())
            peer.ask("use", flash=name == PEERS[0], kv_dtype=args.peer_kv_dtype)
            sides[name] = lambda peer=peer: peer.ask("batch", **given)["seconds"]
        return take_turns(sides, args.rounds)
    finally:
        for peer in peers.values():
            peer.close()


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="7b")
    add(
        "--layers",
        type=int,
        default=4,
        help="of the model whose steps are timed; 0: attention only",
    )
    add("--weights", default="bfloat16", help="dtype of the model's weights")
    add("--kv-dtype", type=names, default=["bfloat16", "int8"], metavar="LIST")
    add("--depth", type=numbers, default=[32768], metavar="LIST", help="tokens of the prefix")
    add("--sequences", type=int, default=8, metavar="N")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each side")
    add("--steps", type=int, default=5, metavar="N", help="steps per turn")
    add("--peer-python", metavar="PYTHON", help="interpreter with llama-cpp-python")
    add("--peer-kv-dtype", default="float16", help="of llama.cpp's cache: float16, q8_0, ...")
    return parsed(parser, words, QUICK)


def main() -> None:
    args = parse(sys.argv[1:])
    print(measure_limits().describe(), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="codellama-rt-bench-") as folder:
        follow("shared_prefix", rows(args, Path(folder)), args.json)


if __name__ == "__main__":
    main()
