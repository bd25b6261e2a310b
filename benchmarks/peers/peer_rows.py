"""Rows of pairs: this runtime beside llama.cpp, Transformers and CTranslate2."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.llm.variants import SHAPES
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.tools.bench.measure import Row
from codellama_rt.tools.bench.runner import Runner
from codellama_rt.tools.bench.synthetic import write_directory, write_gguf
from peers.pairs import OURS, Peer, Round, Slices, compare, take_turns

PEERS = ("llama.cpp", "transformers", "ctranslate2")
SHALLOW = 512  # attention alone is a deep step minus one at this depth
_LLAMACPP_WEIGHTS = {"int8": "q8_0", "int4": "q4_0"}  # others go by their own names
_LLAMACPP_KV = {"int8": "q8_0", "int4": "q4_0", "bfloat16": "float16"}
# Minimum cosine of both sides' logits, by the dtype of weights or cache: runtimes that compute
# different models are not compared.
_LIKENESS = {"int8": 0.99, "int4": 0.9}


@dataclass(frozen=True)
class Setting:
    """What both sides run.

    Attributes:
        peer: a name of `PEERS`.
        weights: of ours; llama.cpp uses q8_0 for int8 and q4_0 for int4, CTranslate2 its int8.
        kv: of our cache; llama.cpp uses float16, q8_0 and q4_0.
    """

    peer: str
    weights: str
    kv: str = "bfloat16"

    @property
    def peer_name(self) -> str:
        """The peer with its weights and its cache, as text."""
        if self.peer != "llama.cpp":
            return f"{self.peer} {self.weights}"
        return f"llama.cpp {self.peer_weights}, {self.peer_kv} cache"

    @property
    def peer_weights(self) -> str:
        """llama.cpp's name of the weights."""
        return _LLAMACPP_WEIGHTS.get(self.weights, self.weights)

    @property
    def peer_kv(self) -> str:
        """llama.cpp's name of the cache."""
        return _LLAMACPP_KV.get(self.kv, self.kv)

    @property
    def variants(self) -> dict[str, bool]:
        """The peer's own settings, of which the fastest counts: llama.cpp's attention kernels.

        Its own one ("flash") is the default and not always faster; quantised values need it.
        """
        if self.peer != "llama.cpp":
            return {"": True}
        return {"flash": True} | ({"no flash": False} if self.kv in FLOAT_DTYPES else {})


def settings(peers: Sequence[str], weights: Sequence[str], kvs: Sequence[str]) -> list[Setting]:
    """Return all possible pairs."""
    found = []
    for peer in peers:
        for dtype in weights:
            if peer == "llama.cpp":
                found += [Setting(peer, dtype, kv) for kv in kvs]
            elif (dtype in FLOAT_DTYPES) == (peer == "transformers"):
                found.append(Setting(peer, dtype, dtype if dtype in FLOAT_DTYPES else kvs[0]))
    if not found:
        raise ValueError(
            f"no pair of {', '.join(peers)} with weights in {', '.join(weights)}: Transformers "
            "runs float weights, CTranslate2 int8"
        )
    return found


@dataclass(frozen=True)
class Work:
    """What to compare in each setting.

    Attributes:
        depths: of decode steps.
        attention: depths of attention alone.
        prefills: lengths of prompts.
        rounds: turns of both sides.
        steps: decode steps per turn.
    """

    depths: Sequence[int] = ()
    attention: Sequence[int] = ()
    prefills: Sequence[int] = ()
    rounds: int = 10
    steps: int = 10


class Files:
    """The same random weights in every format that a side needs, written on first use."""

    def __init__(self, folder: Path, shape: str) -> None:
        """Write into `folder`."""
        self._folder, self._shape = folder, shape

    def directory(self, layers: int, dtype: str) -> Path:
        """Return a Hugging Face directory."""
        path = self._folder / f"{layers}-{dtype}"
        if not path.exists():
            write_directory(path, self._config(layers), dtype=dtype)
        return path

    def gguf(self, layers: int, kind: str, peer: Peer) -> Path:
        """Return a GGUF file; llama.cpp itself quantises."""
        path = self._folder / f"{layers}-{kind}.gguf"
        if not path.exists() and kind in FLOAT_DTYPES:
            write_gguf(path, replace(self._config(layers), dtype=kind))
        elif not path.exists():
            source = self.gguf(layers, "bfloat16", peer)
            peer.ask(
                "quantize",
                source=str(source),
                target=str(path),
                kind=kind,
                threads=ops.num_threads(),
            )
        return path

    def _config(self, layers: int) -> ModelConfig:
        return replace(SHAPES[self._shape], n_layers=layers)


class Sides:
    """Ours and the peer's variants of a setting, opened on models of some numbers of layers."""

    def __init__(
        self, setting: Setting, files: Files, layers: Sequence[int], python: str, longest: int
    ) -> None:
        """Open all.

        Raises:
            RuntimeError: the peer is not available, or a side computes different results.
        """
        self.setting, self.layers = setting, tuple(layers)
        self.runners = {
            n: Runner(open_checkpoint(files.directory(n, setting.weights)), longest, setting.kv)
            for n in self.layers
        }
        self.peers: dict[tuple[str, int], Peer] = {}
        for variant, flash in setting.variants.items():
            for n in self.layers:
                self.peers[variant, n] = self._open(files, n, python, flash)
                self._require_same_model(self.peers[variant, n], self.runners[n])

    def decode(self, depth: int, work: Work, whole: int) -> Row:
        """Time steps after a context, per layer."""
        count = work.steps + 2  # the first two of a turn warm up
        rounds = self._rounds(
            lambda runner: median(runner.decode(depth, count)[2:]),
            lambda peer: median(peer.ask("decode", depth=depth, steps=count)["seconds"][2:]),
            work.rounds,
        )
        several, single = (self.runners[n].decode_bytes(depth) for n in self.layers)
        layer = (several - single) // (self.layers[0] - 1)
        row = compare(rounds, whole, layer, single + (whole - 1) * layer)
        return {"what": "decode", "depth": depth} | row

    def prefill(self, num_tokens: int, work: Work, whole: int) -> Row:
        """Time prompts, per layer."""
        rounds = self._rounds(
            lambda runner: runner.prefill(num_tokens),
            lambda peer: peer.ask("prefill", num_tokens=num_tokens)["seconds"],
            work.rounds,
        )
        return {"what": "prefill", "tokens": num_tokens} | compare(rounds, whole, None, None)

    def attention(self, depth: int, work: Work, whole: int) -> Row:
        """Time a deep step minus a shallow one, in a model of one layer."""
        count = work.steps + 2
        runner, variants = self.runners[1], self.setting.variants

        def ours() -> float:
            return median(runner.decode(depth, count)[2:]) - median(
                runner.decode(SHALLOW, count)[2:]
            )

        def theirs(peer: Peer) -> float:
            deep, shallow = (
                median(peer.ask("decode", depth=at, steps=count)["seconds"][2:])
                for at in (depth, SHALLOW)
            )
            return deep - shallow

        sides = {OURS: ours} | {
            name: lambda peer=self.peers[name, 1]: theirs(peer) for name in variants
        }
        per_token = bytes_per_token(runner.config, runner.kv_dtype)
        row = compare(take_turns(sides, work.rounds), whole, (depth - SHALLOW) * per_token, None)
        return {"what": "attention", "depth": depth} | row

    def forget(self) -> None:
        """Free the peer's caches."""
        for peer in self.peers.values():
            peer.ask("forget")

    def close(self) -> None:
        """Terminate the peers and free the caches."""
        for peer in self.peers.values():
            peer.close()
        self.runners.clear()
        gc.collect()

    def _rounds(
        self, ours: Callable[[Runner], float], theirs: Callable[[Peer], float], rounds: int
    ) -> list[Round]:
        """Run both models of all sides in turn."""
        sides = {OURS: lambda: self._slices(ours, self.runners)}
        for variant in self.setting.variants:
            peers = {n: self.peers[variant, n] for n in self.layers}
            sides[variant] = lambda peers=peers: self._slices(theirs, peers)
        return take_turns(sides, rounds)

    def _slices(self, time: Callable[[Any], float], sides: Mapping[int, Any]) -> Slices:
        several, single = (time(sides[n]) for n in self.layers)
        return Slices(self.layers[0], several, single)

    def _open(self, files: Files, layers: int, python: str, flash: bool) -> Peer:
        setting, threads = self.setting, ops.num_threads()
        peer = Peer(python, f"peer_{setting.peer.replace('.', '')}")
        if setting.peer == "llama.cpp":
            model = files.gguf(layers, setting.peer_weights, peer)
            self.about = peer.ask("open", model=str(model), threads=threads)
            peer.ask("use", flash=flash, kv_dtype=setting.peer_kv)
        else:
            floats = setting.weights if setting.weights in FLOAT_DTYPES else "bfloat16"
            model = files.directory(layers, floats)
            self.about = peer.ask("open", model=str(model), threads=threads, dtype=setting.weights)
        return peer

    def _require_same_model(self, peer: Peer, runner: Runner) -> None:
        token_ids = np.random.default_rng(2).integers(3, runner.config.vocab_size, 16)
        ours = runner.logits(token_ids.tolist())
        theirs = np.array(peer.ask("logits", token_ids=token_ids.tolist())["logits"])
        theirs = theirs[: len(ours)]
        likeness = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
        needed = min(_LIKENESS.get(one, 0.999) for one in (self.setting.weights, self.setting.kv))
        if likeness < needed:
            raise RuntimeError(
                f"{self.setting.peer_name} computes another model than ours: the cosine of the "
                f"logits is {likeness:.4f}, expected {needed}"
            )


def peer_rows(
    chosen: Sequence[Setting], work: Work, *, python: str, shape: str, layers: int
) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows, each as (done, total, row).

    Args:
        chosen: from `settings`.
        work: what to compare in each setting.
        python: the interpreter that has the peers.
        shape: a name of `SHAPES`.
        layers: of the larger of the two models whose difference is measured; at least 2.

    Raises:
        ValueError: fewer layers.
    """
    if layers < 2:
        raise ValueError(f"layers must be at least 2, got {layers}: one layer is subtracted")
    plan, whole = list(_plan(chosen, work, layers)), SHAPES[shape].n_layers
    with tempfile.TemporaryDirectory(prefix="codellama-rt-bench-") as folder:
        files, done, total = Files(Path(folder), shape), 0, sum(len(runs) for *_, runs in plan)
        for setting, models, runs in plan:
            sides = Sides(setting, files, models, python, max(size for _, size in runs))
            for measure, size in runs:
                done += 1
                about = {
                    "model": shape,
                    "layers": models[0],
                    "weights": setting.weights,
                    "kv": setting.kv,
                    "peer": setting.peer_name,
                    "version": sides.about["version"],
                    "isa": ops.isa(),
                    "threads": ops.num_threads(),
                }
                yield done, total, about | getattr(sides, measure)(size, work, whole)
                sides.forget()
            sides.close()


def _plan(
    chosen: Sequence[Setting], work: Work, layers: int
) -> Iterator[tuple[Setting, tuple[int, ...], list[tuple[str, int]]]]:
    """Yield settings, layers of models, and the (kind, size) of what to measure with them."""
    for setting in chosen:
        runs = [("prefill", count) for count in work.prefills]
        if setting.peer != "ctranslate2":  # its cache cannot be set
            runs = [("decode", depth) for depth in work.depths] + runs
        if runs:
            yield setting, (layers, 1), runs
        if work.attention and setting.peer != "ctranslate2":
            yield setting, (1,), [("attention", depth) for depth in work.attention]
