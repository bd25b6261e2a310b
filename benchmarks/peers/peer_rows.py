"""Rows of pairs: this runtime beside llama.cpp, Transformers and CTranslate2."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

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
from peers.pairs import Peer, compare, take_turns

PEERS = ("llama.cpp", "transformers", "ctranslate2")
SHALLOW = 512  # attention alone is a deep step minus one at this depth
_LLAMACPP_WEIGHTS = {"int8": "q8_0", "int4": "q4_0"}  # others go by their own names
_LLAMACPP_KV = {"int8": "q8_0", "int4": "q4_0", "bfloat16": "float16"}
# Minimum cosine of both sides' logits: runtimes that compute different models are not compared.
_LIKENESS = {"int8": 0.99, "int4": 0.9}


@dataclass(frozen=True)
class Setting:
    """The settings of both sides.

    Attributes:
        peer: a name of `PEERS`.
        weights: of ours; llama.cpp uses q8_0 for int8 and q4_0 for int4, CTranslate2 its int8.
        kv: of our cache; llama.cpp uses float16, q8_0 and q4_0.
        flash: whether llama.cpp uses its own attention kernel (default; not always faster).
    """

    peer: str
    weights: str
    kv: str = "bfloat16"
    flash: bool = True

    @property
    def peer_name(self) -> str:
        """The peer with its settings, as text."""
        if self.peer != "llama.cpp":
            return f"{self.peer} {self.weights}"
        weights = _LLAMACPP_WEIGHTS.get(self.weights, self.weights)
        attention = "flash" if self.flash else "no flash"
        return f"llama.cpp {weights}, {_LLAMACPP_KV.get(self.kv, self.kv)} cache, {attention}"


def settings(peers: Sequence[str], weights: Sequence[str], kvs: Sequence[str]) -> list[Setting]:
    """Return all possible pairs; llama.cpp rejects quantised values without flash."""
    found = []
    for peer in peers:
        for dtype in weights:
            if peer == "llama.cpp":
                found += [
                    Setting(peer, dtype, kv, flash)
                    for kv in kvs
                    for flash in (True, False)
                    if flash or kv in FLOAT_DTYPES
                ]
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


class Pair:
    """Both sides of a setting, opened on the same model."""

    def __init__(self, setting: Setting, files: Files, layers: int, python: str, longest: int):
        """Open both.

        Raises:
            RuntimeError: the peer is not available, or the two compute different results.
        """
        self.setting, threads = setting, ops.num_threads()
        self.peer = Peer(python, f"peer_{setting.peer.replace('.', '')}")
        if setting.peer == "llama.cpp":
            kind = _LLAMACPP_WEIGHTS.get(setting.weights, setting.weights)
            model = files.gguf(layers, kind, self.peer)
            self.about = self.peer.ask("open", model=str(model), threads=threads)
            kv = _LLAMACPP_KV.get(setting.kv, setting.kv)
            self.peer.ask("use", flash=setting.flash, kv_dtype=kv)
        else:
            floats = setting.weights if setting.weights in FLOAT_DTYPES else "bfloat16"
            model = files.directory(layers, floats)
            self.about = self.peer.ask(
                "open", model=str(model), threads=threads, dtype=setting.weights
            )
        checkpoint = open_checkpoint(files.directory(layers, setting.weights))
        self.runner = Runner(checkpoint, longest, setting.kv)
        self._require_same_model()

    def decode(self, depth: int, work: Work) -> Row:
        """Time steps after a context."""
        count = work.steps + 2  # the first two of a turn warm up
        rounds = take_turns(
            lambda: self.runner.decode(depth, count)[2:],
            lambda: self.peer.ask("decode", depth=depth, steps=count)["seconds"][2:],
            work.rounds,
        )
        return {"what": "decode", "depth": depth} | compare(rounds, self.runner.decode_bytes(depth))

    def attention(self, depth: int, work: Work) -> Row:
        """Time a deep step minus a shallow one, per layer."""
        count = work.steps + 2

        def ours(at: int) -> float:
            return median(self.runner.decode(at, count)[2:])

        def peers(at: int) -> float:
            return median(self.peer.ask("decode", depth=at, steps=count)["seconds"][2:])

        layers = self.runner.config.n_layers
        rounds = take_turns(
            lambda: [(ours(depth) - ours(SHALLOW)) / layers],
            lambda: [(peers(depth) - peers(SHALLOW)) / layers],
            work.rounds,
        )
        per_token = bytes_per_token(self.runner.config, self.runner.kv_dtype) // layers
        row = compare(rounds, (depth - SHALLOW) * per_token)
        return {"what": "attention", "depth": depth} | row

    def prefill(self, num_tokens: int, work: Work) -> Row:
        """Time prompts."""
        rounds = take_turns(
            lambda: [self.runner.prefill(num_tokens)],
            lambda: [self.peer.ask("prefill", num_tokens=num_tokens)["seconds"]],
            work.rounds,
        )
        return {"what": "prefill", "tokens": num_tokens} | compare(rounds, None)

    def close(self) -> None:
        """Terminate the peer and free the caches."""
        self.peer.close()
        del self.runner
        gc.collect()

    def _require_same_model(self) -> None:
        token_ids = np.random.default_rng(2).integers(3, self.runner.config.vocab_size, 16)
        ours = self.runner.logits(token_ids.tolist())
        theirs = np.array(self.peer.ask("logits", token_ids=token_ids.tolist())["logits"])
        theirs = theirs[: len(ours)]
        likeness = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
        needed = _LIKENESS.get(self.setting.weights, 0.999)
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
        layers: of the model; attention alone is measured in a model of one layer.
    """
    plan = list(_plan(chosen, work, layers))
    with tempfile.TemporaryDirectory(prefix="codellama-rt-bench-") as folder:
        files, done, total = Files(Path(folder), shape), 0, sum(len(runs) for _, _, runs in plan)
        for setting, n_layers, runs in plan:
            pair = Pair(setting, files, n_layers, python, max(size for _, size in runs))
            for measure, size in runs:
                done += 1
                yield (
                    done,
                    total,
                    {
                        "model": f"{shape}, {n_layers} layers",
                        "layers": n_layers,
                        "weights": setting.weights,
                        "kv": setting.kv,
                        "peer": setting.peer_name,
                        "version": pair.about["version"],
                        "threads": ops.num_threads(),
                        **getattr(pair, measure)(size, work),
                    },
                )
                pair.peer.ask("forget")
            pair.close()


def _plan(
    chosen: Sequence[Setting], work: Work, layers: int
) -> Iterator[tuple[Setting, int, list[tuple[str, int]]]]:
    """Yield settings, layers, and the (kind, size) of what to measure with them."""
    for setting in chosen:
        runs = [("prefill", count) for count in work.prefills]
        if setting.peer != "ctranslate2":  # its cache cannot be set
            runs = [("decode", depth) for depth in work.depths] + runs
        if runs:
            yield setting, layers, runs
        if work.attention and setting.peer != "ctranslate2":
            yield setting, 1, [("attention", depth) for depth in work.attention]
