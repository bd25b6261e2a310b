"""Two runtimes in turn: the peer's process, the rounds, and the results of a pair."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from codellama_rt.tools.bench.measure import Row, Timing
from codellama_rt.tools.limits import read_bandwidth

MAX_DRIFT = 0.15  # of the read bandwidth within a round
METHOD = (
    "Method: both sides run the same weights with the same number of threads and take turns, the "
    "first to go changing every round; the read bandwidth is measured around each round, and a "
    f"round in which it moved by over {MAX_DRIFT:.0%} does not count as long as others remain. "
    "`best` divides the shortest runs, `ratio` is the median over rounds of (the peer's median / "
    "ours). Caches are filled with random keys and values, not by a prompt. Attention alone is a "
    "step at that depth minus a step at 512, in a model of one layer, on both sides."
)
_PACKAGES = {
    "peer_llamacpp": "llama-cpp-python",
    "peer_transformers": "transformers and torch",
    "peer_ctranslate2": "ctranslate2, transformers and torch",
}
Burst = Callable[[], list[float]]


class Peer:
    """Another runtime in its own process, which answers one order after another."""

    def __init__(self, python: str, script: str) -> None:
        """Start `<script>.py` of this folder with an interpreter that has the runtime.

        Raises:
            RuntimeError: the interpreter does not exist.
        """
        self._script = Path(__file__).with_name(f"{script}.py")
        self._python = python
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until `close`)
        try:
            self._process = subprocess.Popen(
                [python, str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        except OSError as error:
            raise RuntimeError(f"--peer-python {python}: {error.strerror}") from None

    def ask(self, do: str, **arguments: object) -> dict:
        """Give an order and wait for its answer.

        Raises:
            RuntimeError: the peer ended, or reports an error.
        """
        with contextlib.suppress(BrokenPipeError):  # it has ended: the reason is reported below
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["it said nothing"]
            needed = _PACKAGES[self._script.stem]
            raise RuntimeError(
                f"{self._script.stem} ended with {self._process.wait()}: {said[-1]}; "
                f"--peer-python, {self._python}, must be an interpreter with {needed}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self._script.stem}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Terminate the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()


def take_turns(ours: Burst, peer: Burst, rounds: int) -> list[dict]:
    """Run bursts of both sides alternately, with the read bandwidth before and after."""
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


def compare(rounds: Sequence[dict], num_bytes: int | None) -> Row:
    """Return the row of one pair: median and best of each side, and their ratios.

    Args:
        rounds: of `take_turns`.
        num_bytes: bytes that our side has to read per run; None if arithmetic is the limit.
    """
    steady = [one for one in rounds if one["drift"] <= MAX_DRIFT] or list(rounds)
    ours, peer = (Timing([t for one in steady for t in one[side]]) for side in ("ours", "peer"))
    roof = max(one["read_bandwidth"] for one in steady)
    share = (
        {}
        if num_bytes is None
        else {
            "bytes": num_bytes,
            "gb_per_s": num_bytes / ours.median / 1e9,
            "share": num_bytes / ours.median / roof,
        }
    )
    return {
        "ratio": median([median(one["peer"]) / median(one["ours"]) for one in steady]),
        "best_ratio": peer.best / ours.best,
        "median_us": 1e6 * ours.median,
        "best_us": 1e6 * ours.best,
        "peer_median_us": 1e6 * peer.median,
        "peer_best_us": 1e6 * peer.best,
        **share,
        "read_gb_per_s": roof / 1e9,
        "steady": len(steady),
        "rounds": len(rounds),
    }
