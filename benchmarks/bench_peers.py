"""This runtime against llama.cpp: the same random weights, the same machine, turn by turn.

    python benchmarks/bench_peers.py --peer-python python-with-llama-cpp/bin/python \\
        --shape 7b --layers 4 --depth 512 --prefill 512

llama.cpp runs through llama-cpp-python in a process of its own, built for this very CPU:
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`; on a CPU
neither its flash attention (the default) nor the other setting is always the faster, so both run.

The sides take turns, the first to go changing every round, and the read bandwidth is measured
around each round. A round in which it moved by over 15 % does not count, as long as others remain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from limits import describe
from measure import Timing, save
from runner import Runner
from shapes import SHAPES
from synthetic import write_directory, write_gguf

from codellama_rt import ops
from codellama_rt.dtypes import FLOAT_DTYPES
from codellama_rt.limits import measure_limits, read_bandwidth

MAX_DRIFT = 0.15  # of the read bandwidth within a round
Burst = Callable[[], list[float]]


class Peer:
    """llama.cpp in another process."""

    def __init__(self, python: str, model: Path) -> None:
        script = Path(__file__).with_name("peer_llamacpp.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.ask("open", model=str(model))

    def ask(self, do: str, **arguments: object) -> dict:
        """Give an order and wait for its answer."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the peer ended with {self._process.wait()} instead of an answer; --peer-python "
                "must name an interpreter with llama-cpp-python"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def take_turns(ours: Burst, peer: Burst, rounds: int) -> list[dict]:
    """Bursts of both sides, one after the other, and the read bandwidth before and after."""
    ours(), peer()  # warm-up
    taken = []
    before = read_bandwidth(0.1)
    for i in range(rounds):
        sides = [("ours", ours), ("peer", peer)]
        one = {name: burst() for name, burst in (sides if i % 2 == 0 else reversed(sides))}
        after = read_bandwidth(0.1)
        one["drift"] = abs(after - before) / max(after, before)
        one["read_bandwidth"] = max(after, before)
        taken.append(one)
        before = after
    return taken


def compare(what: str, rounds: list[dict], num_tokens: int, num_bytes: int | None) -> dict:
    """One pair: best and median of each side, and the ratio of the two within a round."""
    steady = [one for one in rounds if one["drift"] <= MAX_DRIFT] or rounds
    timings = {side: Timing([t for one in steady for t in one[side]]) for side in ("ours", "peer")}
    roof = max(one["read_bandwidth"] for one in steady)
    ratios = [median(one["peer"]) / median(one["ours"]) for one in steady]
    print(f"{what}  ({len(steady)} of {len(rounds)} rounds steady, read {roof / 1e9:.1f} GB/s)")
    for side, timing in timings.items():
        rate = f"{num_tokens / timing.best:.2f} tok/s"
        if num_bytes:
            speed = num_bytes / timing.best
            rate += f", {speed / 1e9:.1f} GB/s = {speed / roof:.0%}"
        print(f"  {side} {timing.text()} | {rate}")
    best = timings["peer"].best / timings["ours"].best
    print(f"  ours is {best:.2f} times as fast at best, {median(ratios):.2f} in the median round",
          flush=True)  # fmt: skip
    return {
        "what": what, "ratio_best": best, "ratio_median": median(ratios), "read_bandwidth": roof,
        "steady": len(steady), "rounds": len(rounds),
        **{side: timing.record() for side, timing in timings.items()},
    }  # fmt: skip


def same_model(runner: Runner, peer: Peer) -> None:
    """Refuse to compare two models that do not compute the same."""
    token_ids = np.random.default_rng(2).integers(3, runner.config.vocab_size, 16).tolist()
    ours = runner.logits(token_ids)
    theirs = np.array(peer.ask("logits", token_ids=token_ids)["logits"], np.float32)
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if difference > 0.05:
        raise RuntimeError(f"the two models differ: logits by {difference:.1%} of the largest")
    print(f"the same model: logits of 16 tokens agree within {difference:.2%} of the largest")


def run(args: argparse.Namespace, ours: Path, gguf: Path) -> list[dict]:
    """All pairs asked for."""
    longest = max([*args.depth, *args.prefill])
    runner, peer = Runner(ours, longest, args.kv_dtype), Peer(args.peer_python, gguf)
    print(f"peer: llama-cpp-python {peer.about['version']}; {peer.about['system']}")
    rows = []
    for flash in (True, False):
        options = {"threads": ops.num_threads(), "flash": flash, "kv_dtype": args.peer_kv_dtype}
        peer.ask("make_context", num_tokens=longest + args.steps + 1, **options)
        if flash:
            same_model(runner, peer)
        name = "llama.cpp with flash" if flash else "llama.cpp without flash"
        for depth in args.depth:
            order = {"do": "decode", "depth": depth, "steps": args.steps + 2}
            rounds = take_turns(
                lambda depth=depth: runner.decode(depth, args.steps + 2)[2:],
                lambda order=order: peer.ask(**order)["seconds"][2:],
                args.rounds,
            )
            what = f"decode at depth {depth}, {name}"
            rows.append(compare(what, rounds, 1, runner.decode_bytes(depth)))
        for count in args.prefill:
            rounds = take_turns(
                lambda count=count: [runner.prefill(count)],
                lambda count=count: [peer.ask("prefill", num_tokens=count)["seconds"]],
                args.rounds,
            )
            rows.append(compare(f"prefill of {count} tokens, {name}", rounds, count, None))
    peer.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH",
                        help="interpreter with llama-cpp-python; this one by default")  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--model", type=Path, help="ours, instead of one written for the run")
    parser.add_argument("--gguf", type=Path, help="the peer's; ours too without --model")
    parser.add_argument("--depth", type=int, nargs="*", default=[512])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--kv-dtype", choices=("auto", *FLOAT_DTYPES), default="auto")
    parser.add_argument("--peer-kv-dtype", choices=FLOAT_DTYPES, default="float16",
                        help="llama.cpp's own default is float16")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="decode steps a turn")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        ops.set_num_threads(args.threads)
    print(describe(measure_limits()))
    with tempfile.TemporaryDirectory() as folder:
        if args.gguf is None:
            config = replace(SHAPES[args.shape], n_layers=args.layers)
            args.model, args.gguf = Path(folder) / "ours", Path(folder) / "peer.gguf"
            write_directory(args.model, config)
            write_gguf(args.gguf, config)
        rows = run(args, args.model or args.gguf, args.gguf)
    save(args.json, rows)


if __name__ == "__main__":
    main()
