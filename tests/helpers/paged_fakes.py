"""A model whose logits are a hash of what it reads back from a paged cache, for engine tests.

Each slot holds a hash of the whole prefix up to its token, as real keys and values depend on it.
A wrong block, a missing copy or a stale block changes every later token.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np

from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.config import ModelConfig

MASK = 2**64 - 1
LETTERS = "abcdefgh"
PROMPT = [1, 10, 11, 12, 13, 14]


class FakeKVCache:
    in_host_memory = True

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.slots = np.zeros(num_blocks * block_size, np.uint64)

    def copy_blocks(self, pairs):
        assert pairs.dtype == np.int32
        pages = self.slots.reshape(self.num_blocks, self.block_size)
        for source, destination in pairs:
            pages[destination] = pages[source]

    def block_buffers(self, block_id):
        page = self.slots.reshape(self.num_blocks, self.block_size)[block_id]
        return [memoryview(page.view(np.uint8))]


class HashModel:
    """Deterministic logits in [0, 8); NaN after `nan_token`, for a request that must fail."""

    def __init__(self, vocab_size=64, eos_token_ids=(2,), nan_token=None, rope_scaling=None):
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            rope_scaling=rope_scaling,
            max_position_embeddings=32,
            n_layers=1,
            dim=8,
            hidden_dim=8,
            n_heads=1,
            n_kv_heads=1,
            head_dim=8,
        )
        self.config.rope_class = partial(ModelConfig.rope_class, self.config)
        self.nan_token = nan_token
        self.num_computed_tokens = 0
        self.largest_batch = (0, 0)  # sequences, tokens
        self._weights = np.random.default_rng(0).integers(1, MASK, 4096, np.uint64)

    def forward(self, batch, kv_cache):
        check_layout(batch, kv_cache)
        num_seqs, num_tokens = len(batch.seq_lens), len(batch.token_ids)
        self.num_computed_tokens += num_tokens
        self.largest_batch = tuple(np.maximum(self.largest_batch, (num_seqs, num_tokens)))
        for i in range(num_seqs):
            self._write(batch, i, kv_cache)
        rows = [self._logits(batch, row, kv_cache) for row in batch.logit_rows]
        return np.array(rows, np.float32).reshape(len(rows), self.config.vocab_size)

    def _write(self, batch, i, kv_cache):
        begin, end = batch.cu_seqlens_q[i : i + 2]
        slots = slots_of(batch, i, kv_cache.block_size)
        first = int(batch.positions[begin])
        state = int(kv_cache.slots[slots[first - 1]]) if first else 7
        for t in range(begin, end):
            base = 0 if batch.rope_lengths is None else max(0, int(batch.rope_lengths[t]) - 32)
            state ^= int(batch.token_ids[t]) + 1000 * int(batch.positions[t]) + 10**7 * base
            state = state * 0xBF58476D1CE4E5B9 & MASK
            state ^= state >> 29
            kv_cache.slots[batch.slot_mapping[t]] = state

    def _logits(self, batch, row, kv_cache):
        i = int(np.searchsorted(batch.cu_seqlens_q, row, side="right")) - 1
        length = int(batch.positions[row]) + 1
        read = kv_cache.slots[slots_of(batch, i, kv_cache.block_size)[:length]]
        state = (read * self._weights[:length]).sum(dtype=np.uint64)
        hashed = (state ^ self._weights[: self.config.vocab_size]) * np.uint64(0x94D049BB133111EB)
        logits = (hashed >> np.uint64(40)).astype(np.float32) / 2**21
        return logits * np.nan if batch.token_ids[row] == self.nan_token else logits


def slots_of(batch, i, block_size):
    """The slots of sequence i, one a position."""
    positions = np.arange(batch.seq_lens[i])
    return batch.block_tables[i][positions // block_size] * block_size + positions % block_size


def check_layout(batch, kv_cache):
    """What the kernels rely on."""
    arrays = [batch.token_ids, batch.positions, batch.cu_seqlens_q, batch.seq_lens]
    arrays += [batch.block_tables, batch.slot_mapping, batch.logit_rows]
    for array in arrays:
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping), "two tokens, one slot"
    for i, seq_len in enumerate(batch.seq_lens):
        begin, end = batch.cu_seqlens_q[i : i + 2]
        assert batch.positions[begin:end].tolist() == list(range(seq_len - (end - begin), seq_len))
        used = batch.block_tables[i][: -(-seq_len // kv_cache.block_size)]
        assert ((used >= 0) & (used < kv_cache.num_blocks)).all()
        slots = slots_of(batch, i, kv_cache.block_size)[begin - end :]
        assert slots.tolist() == batch.slot_mapping[begin:end].tolist()


class FakeTokenizer:
    """Token i is two letters of 64 pairs; token 0 holds its text back until the next one."""

    end_ids = ()

    def control_id(self, name):
        return None

    def filling_end(self, prompt_ids):
        return None

    def detokenizer(self, prompt_ids, *, skip_special_tokens=True):
        assert all(type(token_id) is int for token_id in prompt_ids)
        return FakeDetokenizer()


class FakeDetokenizer:
    def __init__(self):
        self.held = ""

    def push(self, token_id):
        text = self.held + piece(token_id)
        self.held = text if token_id == 0 else ""
        return "" if token_id == 0 else text

    def flush(self):
        text, self.held = self.held, ""
        return text


class FailingTokenizer(FakeTokenizer):
    """Cannot decode one token."""

    def __init__(self, token_id):
        self.token_id = token_id

    def detokenizer(self, prompt_ids, *, skip_special_tokens):
        return self

    def push(self, token_id):
        if token_id == self.token_id:
            raise LookupError("no such piece")
        return "."

    def flush(self):
        return ""


def piece(token_id):
    return LETTERS[token_id // 8 % 8] + LETTERS[token_id % 8]


def engine_of(num_blocks=64, block_size=4, *, model=None, tokenizer=True, **options):
    """Return an engine whose steps, unless a test says otherwise, depend on no clock."""
    options = {"max_model_len": 256, "max_step_seconds": None, **options}
    if isinstance(tokenizer, bool):
        tokenizer = FakeTokenizer() if tokenizer else None
    return Engine(model or HashModel(), FakeKVCache(num_blocks, block_size), tokenizer, **options)


def drain_interrupted(engine, faults, step):
    """Runs to the end, one step with faults; (request_id, index) -> tokens, text, how it ended."""
    gained, steps = {}, 0
    while engine.has_unfinished():
        steps += 1
        assert steps < 100
        try:
            outputs = faults.call(engine.step) if steps == step else engine.step()
        except (KeyboardInterrupt, RuntimeError) as error:
            assert str(error) == "injected"  # noqa: PT017
        else:
            collect(gained, outputs)
    return {key: (total.token_ids, total.text, total.end) for key, total in gained.items()}


def drain(engine):
    """Runs to the end; (request_id, index) -> what the caller has got, joined."""
    gained = {}
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert not engine.table.samples
    return gained


def collect(gained, outputs):
    for output in outputs:
        total = gained.setdefault(
            (output.request_id, output.index),
            SimpleNamespace(token_ids=[], text="", logprobs=[], prompt_logprobs=None, end=None),
        )
        assert total.end is None, "an output after the last"
        total.token_ids += output.token_ids
        total.text += output.text
        total.logprobs += output.logprobs or []
        total.prompt_logprobs = total.prompt_logprobs or output.prompt_logprobs
        total.metrics = output.metrics
        assert output.finished == (output.finish_reason is not None)
        if output.finished:
            total.end = (output.finish_reason, output.stop_reason)
            total.error = output.error


def plain(total):
    """What of a collected output says what came, to be compared."""
    prompt_logprobs = None if total.prompt_logprobs is None else list(total.prompt_logprobs)
    return total.token_ids, total.text, total.logprobs, prompt_logprobs, total.end


def check_outputs(requests, chosen, gained, unwanted):
    """Every output is the expected one, or its beginning where the request was aborted.

    Args:
        requests: (prompt, params, expected output per sample, as `plain` has it) by number.
        chosen: numbers of those that ran.
        gained: by `collect`.
        unwanted: names of those that were aborted.
    """
    for i in chosen:
        _, params, expected = requests[i]
        for index in range(params.n):
            total = gained[str(i), index]
            if total.end == ("abort", None):
                assert str(i) in unwanted
                assert total.token_ids == expected[index][0][: len(total.token_ids)]
            else:
                assert plain(total) == expected[index]


def generate(prompt=PROMPT, params=None, **options):
    """One request alone."""
    engine = engine_of(**options)
    engine.add_request("r", prompt, params or SamplingParams(max_tokens=12, ignore_eos=True))
    return drain(engine)["r", 0]


def greedy_tokens(count=12, prompt=PROMPT):
    return generate(prompt, SamplingParams(max_tokens=count, ignore_eos=True)).token_ids
