"""Two runtimes in turn: the peer's process, the rounds, and the results of a pair."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from codellama_rt.tools.bench.measure import MOST_DRIFT, Row, drift
from codellama_rt.tools.limits import read_bandwidth

METHOD = (
    "Method: all sides run the same weights with the same number of threads and take turns, the "
    "first to go changing every round; the read bandwidth is measured around each round, and a "
    f"round in which it moved by over {MOST_DRIFT:.0%} does not count as long as others remain. "
    "Times are per whole layer: a model of several layers less one of one layer; what remains of "
    "that is the head. llama.cpp runs with and without flash attention, and the faster one counts. "
    "`ratio` is the median over rounds of (the peer's / ours) per layer, `whole` of all layers and "
    "the head. Caches are filled with random keys and values, not by a prompt. Attention alone is "
    "a step at that depth minus a step at 512, in a model of one layer."
)
_PACKAGES = {
    "peer_llamacpp": "llama-cpp-python",
    "peer_transformers": "transformers and torch",
    "peer_ctranslate2": "ctranslate2, transformers and torch",
    "peer_openvino": "openvino-genai",
    "peer_torch": "torch",
}
OURS = "ours"


@dataclass(frozen=True)
class Slices:
    """Median seconds of one turn: of a model of `layers` layers, and of one of one layer."""

    layers: int
    several: float
    single: float

    @property
    def layer(self) -> float:
        """Seconds of one layer."""
        return (self.several - self.single) / (self.layers - 1)

    def whole(self, layers: int) -> float:
        """Return the seconds of so many layers and the head."""
        return self.single + (layers - 1) * self.layer


Turn = float | Slices


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


@dataclass(frozen=True)
class Round:
    """What each side took in one round, and the read bandwidth around it."""

    turns: dict[str, Turn]
    drift: float
    read_bandwidth: float


def take_turns(sides: Mapping[str, Callable[[], Turn]], rounds: int) -> list[Round]:
    """Run all sides in turn, with the read bandwidth before and after each round."""
    for run in sides.values():  # warm-up
        run()
    taken, order = [], list(sides)
    before = read_bandwidth(0.1)
    for _ in range(rounds):
        turns = {name: sides[name]() for name in order}
        after = read_bandwidth(0.1)
        taken.append(Round(turns, drift(before, after), max(after, before)))
        before, order = after, [*order[1:], order[0]]
    return taken


def compare(
    rounds: Sequence[Round], whole_layers: int, num_bytes: int | None, whole_bytes: int | None
) -> Row:
    """Return the row of ours beside the fastest of the peer's settings.

    Args:
        rounds: of `take_turns`; the sides are `OURS` and the peer's settings.
        whole_layers: of the whole model.
        num_bytes: bytes that our side has to read per turn, or per layer of `Slices`; None if
            arithmetic is the limit.
        whole_bytes: the same for the whole model.
    """
    steady = [one for one in rounds if one.drift <= MOST_DRIFT] or list(rounds)
    roof = max(one.read_bandwidth for one in steady)

    def middle(name: str, value: Callable[[Turn], float]) -> float:
        return median(value(one.turns[name]) for one in steady)

    def over(name: str, value: Callable[[Turn], float]) -> float:
        return median(value(one.turns[name]) / value(one.turns[OURS]) for one in steady)

    def whole(turn: Slices) -> float:
        return turn.whole(whole_layers)

    is_sliced = isinstance(steady[0].turns[OURS], Slices)
    first = whole if is_sliced else float
    settings = {name: middle(name, first) for name in steady[0].turns if name != OURS}
    best = min(settings, key=settings.get)
    part = (lambda turn: turn.layer) if is_sliced else float
    ours = middle(OURS, part)
    row = {
        "setting": best,
        "settings_us": {name: 1e6 * seconds for name, seconds in settings.items()},
        "ratio": over(best, part),
        "median_us": 1e6 * ours,
        "peer_median_us": 1e6 * middle(best, part),
        "read_gb_per_s": roof / 1e9,
        "roof_drift": min(one.drift for one in rounds),
        "steady": sum(one.drift <= MOST_DRIFT for one in rounds),
        "rounds": len(rounds),
    }
    if is_sliced:
        row["whole_ratio"] = over(best, whole)
        row["whole_us"] = 1e6 * middle(OURS, whole)
        row["peer_whole_us"] = 1e6 * middle(best, whole)
    if num_bytes is not None:
        row["bytes"] = num_bytes
        row["gb_per_s"] = num_bytes / ours / 1e9
        row["share"] = num_bytes / ours / roof
    if whole_bytes is not None:
        row["whole_bytes"] = whole_bytes
    return row
