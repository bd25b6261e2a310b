"""A small model in one to many sequences, in turn with llama.cpp and OpenVINO GenAI.

    python benchmarks/bench_small.py --peer-python PYTHON [--model FILE.gguf] [--weights bfloat16]

Without --model it is SmolLM2-135M in Q4_1; --weights float16 or bfloat16 writes the same model in
that dtype for all sides, but for OpenVINO, which reads no bfloat16, in float16. A step computes one
token of each sequence after a prompt of --depth tokens. llama.cpp runs with and without flash
attention, and each sequence has a cache of its own. OpenVINO's times are those that it reports
itself. The prompt (--prefill) is of one sequence.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import gguf
import numpy as np
from peers.pairs import OURS, Peer, compare, take_turns
from scripts import follow, names, new_parser, numbers, parsed

from codellama_rt import LLM, SamplingParams, ops
from codellama_rt.checkpoint.model_names import resolve_model
from codellama_rt.tools.bench.measure import Row
from codellama_rt.tools.limits import measure_limits

PEERS = ("llama.cpp", "openvino")
WARM = 2  # steps of a turn that do not count
QUICK = {"sequences": [1, 2], "depth": 32, "prefill": [16], "rounds": 1, "steps": 2}


@dataclass(frozen=True)
class Work:
    """What to compare: steps of so many sequences at a depth, and prompts."""

    sequences: Sequence[int]
    depth: int
    prefills: Sequence[int]
    rounds: int
    steps: int


class Ours:
    """Sequences behind our engine."""

    def __init__(self, model: Path, work: Work, threads: int) -> None:
        """Open the model."""
        # The first sequences go on while the prompts of the last ones are computed, which is in
        # full chunks, like those of peers: so all are of nearly the same depth.
        self._new = work.depth + work.steps + WARM
        longest = max(work.depth + self._new, *work.prefills, 1)
        self._llm = LLM(
            str(model),
            num_threads=threads,
            max_model_len=longest + 1,
            max_num_seqs=max(work.sequences, default=1),
            max_step_seconds=None,
            prefix_caching=False,
        )
        self.vocab_size = self._llm.config.vocab_size
        self._rng = np.random.default_rng(0)

    def batch(self, num_seqs: int, depth: int, steps: int) -> float:
        """Return the median seconds of a step of all sequences.

        Raises:
            RuntimeError: sequences ended before the prompts of all were computed.
        """
        engine = self._llm.engine
        for i in range(num_seqs):
            self._add(f"bench {i}", depth, self._new)
        seconds = []
        while len(seconds) < steps + WARM:
            started = perf_counter()
            outputs = engine.step()
            if any(output.finished for output in outputs):
                raise RuntimeError(f"{num_seqs} sequences of {depth} tokens never run together")
            if len(outputs) == num_seqs:  # all prompts are done
                seconds.append(perf_counter() - started)
        for i in range(num_seqs):
            engine.abort(f"bench {i}")
        return median(seconds[WARM:])

    def prefill(self, num_tokens: int) -> float:
        """Return the seconds of one prompt, up to its first new token."""
        self._add("bench", num_tokens, 1)
        started = perf_counter()
        while self._llm.engine.has_unfinished():
            self._llm.engine.step()
        return perf_counter() - started

    def _add(self, name: str, num_tokens: int, new: int) -> None:
        prompt = self._rng.integers(3, self.vocab_size, num_tokens)
        params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0)
        self._llm.engine.add_request(name, prompt, params)


def small_rows(
    model: Path,
    weights: str,
    peers: Mapping[str, Path],
    work: Work,
    python: str,
    threads: Sequence[int],
) -> Iterator[tuple[int, int, Row]]:
    """Yield all rows as (done, total, row): each work in turn, for each number of threads.

    Args:
        model: of our side, a GGUF file.
        weights: what its matrices are in, for the rows.
        peers: of `PEERS`, each with the file that it reads.
        work: what to time.
        python: the interpreter that has the peers.
        threads: of each side.
    """
    runs = [("batch", count) for count in work.sequences]
    runs += [("prefill", count) for count in work.prefills]
    done, total, before = 0, len(threads) * len(runs), ops.num_threads()
    try:
        for count in threads:
            ops.set_num_threads(count)
            ours, others, versions = Ours(model, work, count), {}, {}
            for name, peer, about in _open(peers, python, count, ours.vocab_size):
                others[name], versions[name] = peer, about["version"]
            for what, size in runs:
                done += 1
                row = _row(ours, others, what, size, work)
                about = {
                    "model": model.stem,
                    "weights": weights,
                    "isa": ops.isa(),
                    "threads": count,
                    "peer": ", ".join(peers),
                    "versions": versions,
                }
                yield done, total, about | row
            for peer in others.values():
                peer.close()
    finally:
        ops.set_num_threads(before)


def _open(
    peers: Mapping[str, Path], python: str, threads: int, vocab_size: int
) -> Iterator[tuple[str, Peer, dict]]:
    """Yield each setting of the peers by name, opened."""
    for name, model in peers.items():
        if name == "openvino":
            peer = Peer(python, "peer_openvino")
            about = peer.ask("open", model=str(model), threads=threads, vocab_size=vocab_size)
            yield name, peer, about
            continue
        for flash in (True, False):
            peer = Peer(python, "peer_llamacpp")
            about = peer.ask("open", model=str(model), threads=threads)
            peer.ask("use", flash=flash, kv_dtype="float16")
            yield f"llama.cpp, {'flash' if flash else 'no flash'}", peer, about


def _row(ours: Ours, others: Mapping[str, Peer], what: str, size: int, work: Work) -> Row:
    """Time one work on all sides in turn."""
    if what == "prefill":
        sides = {OURS: lambda: ours.prefill(size)} | {
            name: lambda peer=peer: peer.ask("prefill", num_tokens=size)["seconds"]
            for name, peer in others.items()
        }
        return {"what": "prefill", "tokens": size} | compare(
            take_turns(sides, work.rounds), 1, None, None
        )
    given = {"num_seqs": size, "depth": work.depth, "steps": work.steps}
    sides = {OURS: lambda: ours.batch(**given)} | {
        name: lambda peer=peer: peer.ask("batch", **given)["seconds"]
        for name, peer in others.items()
    }
    row = compare(take_turns(sides, work.rounds), 1, None, None)
    return {"what": "batch", "sequences": size, "depth": work.depth} | row


def in_dtype(source: Path, target: Path, dtype: str) -> None:
    """Write a GGUF model with its matrices in a float dtype, all else as it is."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    kind = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        inner = field.types[-1] if is_list else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            stored = gguf.quants.quantize(values, kind[dtype])
            writer.add_tensor(tensor.name, stored, raw_dtype=kind[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--peer", type=names, default=list(PEERS), metavar="LIST", help=", ".join(PEERS))
    add("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter with them")
    add("--model", default="smollm2-135m-instruct", help="a GGUF file or a short name")
    add("--weights", choices=("as stored", "float16", "bfloat16"), default="as stored")
    add("--sequences", type=numbers, default=[1, 8, 32], metavar="LIST")
    add("--depth", type=int, default=256, metavar="N", help="tokens of each sequence's prompt")
    add("--prefill", type=numbers, default=[512], metavar="LIST", help="tokens of prompts")
    add("--threads", type=numbers, default=[ops.num_threads()], metavar="LIST")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each side")
    add("--steps", type=int, default=12, metavar="N", help="steps per turn")
    return parsed(parser, words, QUICK)


def main() -> None:
    args = parse(sys.argv[1:])
    print(measure_limits().describe(), file=sys.stderr, flush=True)
    work = Work(args.sequences, args.depth, args.prefill, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="codellama-rt-bench-") as folder:
        model = Path(resolve_model(args.model))
        if args.weights != "as stored":
            stored, model = model, Path(folder) / f"{model.stem}-{args.weights}.gguf"
            in_dtype(stored, model, args.weights)
        peers = dict.fromkeys(args.peer, model)
        if args.weights == "bfloat16" and "openvino" in peers:
            peers["openvino"] = Path(folder) / f"{stored.stem}-float16.gguf"
            in_dtype(stored, peers["openvino"], "float16")
        rows = small_rows(model, args.weights, peers, work, args.peer_python, args.threads)
        follow("small", rows, args.json)


if __name__ == "__main__":
    main()
