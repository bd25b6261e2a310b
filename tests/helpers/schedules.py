"""Random schedules of fixed requests on one model, and every row of logits that comes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from codellama_rt.engine.disk_cache.store import PrefixStore
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.sequence import Chunk, Sequence
from codellama_rt.engine.structured_outputs import StructuredOutputs
from codellama_rt.model.fingerprint import fingerprint
from codellama_rt.text.tokenizer import load_tokenizer
from helpers.builders import running_on
from helpers.goldens import make_engine, tiny_golden
from helpers.speculating import propose_right_and_wrong
from helpers.tokenizer_files import model_file

NUM_REQUESTS = 40
LONGEST_PROMPT = 150
MODELS = {  # checkpoint; dtype of its floats, of the cache; quantization of its weights
    "bf16": ("gqa_theta1e6_bf16", "bfloat16", "bfloat16", None),
    "fp32": ("tied_fp32", "float32", "float32", None),
    "mixed": ("mqa_fp16_sharded", "float16", "float32", None),
    "dynamic": ("rope_dynamic2", "float32", "float32", None),
    "int8 cache": ("gqa_theta1e6_bf16", "bfloat16", "int8", None),
    "int4 cache": ("mqa_fp16_sharded", "bfloat16", "int4", None),
    "int8 weights": ("gqa_theta1e6_bf16", "bfloat16", "bfloat16", "int8"),
    "int4 weights": ("tied_fp32", "float32", "float16", "int4"),
    "int4 both": ("mqa_fp16_sharded", "float16", "int4", "int4"),
}

SALTS = (None, None, "another user's")  # of requests in turn
FORMS = [
    StructuredOutputs(regex="[a-z ]{3,12}"),
    StructuredOutputs(choice=["one", "another", "one more"]),
    StructuredOutputs(json={"type": "array", "items": {"type": "integer"}, "maxItems": 3}),
]

Rows = dict[tuple[int, int], bytes]  # (sample, position of a token) -> the logits after it


@dataclass(frozen=True)
class FixedRequest:
    """A prompt and how to go on from it."""

    prompt: tuple[int, ...]
    params: SamplingParams

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.params.max_tokens


@cache
def fixed_requests() -> list[FixedRequest]:
    """Prompts with common beginnings; greedy and seeded, one sample and several, some in a form."""
    rng = np.random.default_rng(7)
    texts = rng.integers(3, 500, (4, LONGEST_PROMPT))
    requests = []
    for i in range(NUM_REQUESTS):
        common, own = rng.integers(0, 120), rng.integers(1, 30)
        prompt = (1, *texts[i % 4, :common], *rng.integers(3, 500, own))
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 25)), ignore_eos=bool(rng.integers(2)), seed=i,
            n=int(rng.choice([1, 1, 1, 2, 3])), temperature=float(rng.choice([0.0, 0.8])),
            prompt_logprobs=0 if i % 5 == 0 else None,
        )  # fmt: skip
        if i % 4 == 1:
            form = FORMS[i // 4 % len(FORMS)]
            params = replace(params, structured_outputs=form, ignore_eos=False)
        requests.append(FixedRequest(tuple(map(int, prompt)), params))
    return requests


class Recorder:
    """Stands between engine and model; keeps the rows of logits of each request."""

    def __init__(self, model: object) -> None:
        self.config = model.config
        self.model = model
        self.rows: dict[int, Rows] = {}
        self.token_ids: dict[tuple[int, int], list[int]] = {}
        self.proposed: list[tuple[Chunk, Rows]] = []  # rows of the last step behind known tokens
        self.counts = Counter()

    def attach(self, engine: Engine) -> None:
        """Learn from the engine's scheduler whose rows come next, and shuffle its free blocks."""
        schedule = engine.scheduler.schedule

        def remember():
            self.chunks = schedule()
            self.counts["copies"] += len(engine.scheduler.blocks.copies)
            return self.chunks

        engine.scheduler.schedule = remember
        self.requests: list[int] = []  # by order of arrival
        self.engine = engine

    def add(self, request: int, priority: int = 0) -> None:
        fixed = fixed_requests()[request]
        self.requests.append(request)
        self.rows[request] = {}
        self.counts["forms"] += fixed.params.structured_outputs is not None
        self.engine.add_request(
            str(request),
            fixed.prompt,
            fixed.params,
            priority=priority,
            cache_salt=SALTS[request % 3],
        )

    def forward(self, batch, kv_cache) -> np.ndarray:
        logits = self.model.forward(batch, kv_cache)
        row, self.proposed = 0, []
        for chunk in self.chunks:
            rows, known = {}, chunk.stop - len(chunk.draft)
            for position in range(chunk.stop - chunk.num_logits, chunk.stop):
                rows[chunk.sequence.order[-1], position] = logits[row].tobytes()
                row += 1
            self._keep(chunk, {key: bits for key, bits in rows.items() if key[1] < known})
            self.proposed.append((chunk, {k: bits for k, bits in rows.items() if k[1] >= known}))
        assert row == len(logits)
        return logits

    def _keep(self, chunk: Chunk, rows: Rows) -> None:
        kept = self.rows[self.requests[chunk.sequence.order[1]]]
        for key, bits in rows.items():
            assert kept.setdefault(key, bits) == bits, f"recomputed otherwise: {key}"

    def step(self) -> None:
        outputs = self.engine.step()
        for chunk, rows in self.proposed:  # those after tokens that were accepted, and went on
            used = len(chunk.sequence.token_ids) - 1
            self._keep(chunk, {key: bits for key, bits in rows.items() if key[1] < used})
        self.proposed = []
        for output in outputs:
            assert output.error is None, output.error
            key = int(output.request_id), output.index
            self.token_ids.setdefault(key, []).extend(output.token_ids)

    def finish(self) -> None:
        """Count what happened; every block must be free again."""
        stats = self.engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"], "pages leaked"
        self.counts["preemptions"] += stats["preemptions"]
        self.counts["hits"] += stats["prefix_hit_tokens"]
        self.counts["restored"] += stats.get("prefix_restored_tokens", 0)
        self.counts["partial hits"] += stats["prefix_partial_hit_tokens"]
        self.counts["accepted"] += stats["accepted_tokens"]
        self.counts["rejected"] += stats["draft_tokens"] - stats["accepted_tokens"]


@cache
def model(name: str):
    checkpoint, dtype, _, quantization = MODELS[name]
    return tiny_golden(checkpoint).model(dtype, quantization)


@cache
def tokenizer():
    """One that names most of the models' ids."""
    with TemporaryDirectory() as folder:
        return load_tokenizer(model_file(Path(folder)), 512)


@cache
def undisturbed(name: str, isa: str, request: int) -> tuple[Rows, dict[int, list[int]]]:
    """The rows and tokens of a request that has the engine for itself."""
    recorder = Recorder(model(name))
    with running_on(isa, 1):
        engine = make_engine(
            recorder, num_blocks=40, block_size=64, kv_dtype=MODELS[name][2],
            prefix_caching=False, tokenizer=tokenizer(),
        )  # fmt: skip
        recorder.attach(engine)
        recorder.add(request)
        while engine.has_unfinished():
            recorder.step()
    recorder.finish()
    tokens = {sample: ids for (_, sample), ids in recorder.token_ids.items()}
    return recorder.rows[request], tokens


def run_schedule(name: str, isa: str, seed: int, folder: Path | None = None) -> Recorder:
    """One random schedule from beginning to end, perhaps with prefixes of earlier ones on disk."""
    rng = np.random.default_rng(seed)
    requests = rng.permutation(NUM_REQUESTS)[: rng.integers(1, 33)].tolist()
    block_size = int(rng.choice([16, 32, 64]))
    fewest = max(-(-fixed_requests()[i].longest // block_size) for i in requests)
    recorder = Recorder(model(name))
    engine = make_engine(
        recorder, num_blocks=fewest + int(rng.integers(0, 3 * fewest)), block_size=block_size,
        kv_dtype=MODELS[name][2], prefix_caching=bool(rng.integers(2)) or folder is not None,
        max_num_seqs=int(rng.integers(1, 33)), max_num_batched_tokens=int(rng.integers(16, 513)),
        max_step_seconds=[None, 1e-4, 1e-3, 1e-2][rng.integers(4)], tokenizer=tokenizer(),
        speculation=None if seed % 2 else "suffix",
        prefix_store=None if folder is None else store_of(name, folder, block_size),
    )  # fmt: skip
    if seed % 2 == 0:
        propose_right_and_wrong(engine, rng, partial(output_of, name, isa, recorder))
    make_up_times(engine, seed)
    rng.shuffle(engine.scheduler.blocks._free)
    recorder.attach(engine)
    recorder.add(requests.pop())
    with running_on(isa, int(rng.integers(1, 3))):
        while requests or engine.has_unfinished():
            while requests and rng.random() < 0.7:
                recorder.add(requests.pop(), int(rng.integers(3)))
            disturb(engine, rng)
            recorder.step()
    engine.close()
    recorder.finish()
    return recorder


def make_up_times(engine: Engine, seed: int) -> None:
    """Let the cost of steps learn the times of a made-up machine: a seed is one schedule on all."""
    cost, rng = engine.scheduler.cost, np.random.default_rng(seed)
    if cost is None:
        return
    learn = cost.learn

    def learn_made_up(positions, seq_lens, _):
        seconds = 1e-4 + 5e-6 * len(positions) + 1e-8 * seq_lens.sum()
        learn(positions, seq_lens, rng.uniform(0.5, 2.0) * seconds)

    cost.learn = learn_made_up


def output_of(name: str, isa: str, recorder: Recorder, sequence: Sequence) -> list[int]:
    """What a sequence will have written in the end."""
    _, arrival, sample = sequence.order
    return undisturbed(name, isa, recorder.requests[arrival])[1][sample]


def store_of(name: str, folder: Path, block_size: int) -> PrefixStore:
    """The prefixes of one of the models in a folder."""
    sizes = {"kv_dtype": MODELS[name][2], "block_size": block_size}
    identity = fingerprint(model(name).config, model(name).weights, **sizes)
    return PrefixStore(str(folder), 10**7, identity, block_size=block_size)


def disturb(engine: Engine, rng: np.random.Generator) -> None:
    """Now and then a running sequence, not the last, loses its blocks, or all prefixes go."""
    running = engine.scheduler.running
    if rng.random() < 0.02:
        engine.reset_prefix_cache()
    if running and rng.random() < 0.05:
        engine.scheduler.preempt(running[rng.integers(len(running))])
