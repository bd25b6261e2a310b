"""Samples and requests over one long prefix: their steps attend it once, with the bits of each.

The tables of the steps are looked at too: were their heads not equal, the pass over shared blocks
(csrc/cpu/attention/plan.h, whole splits of 1024 tokens) would never run, and nothing be tested.
"""

import numpy as np
import pytest
from helpers.goldens import make_engine, tiny_golden

from codellama_rt.engine.sampling_params import SamplingParams

SPLIT = 1024
PREFIX = [1, *np.random.default_rng(3).integers(3, 500, 2100).tolist()]
MODELS = {  # checkpoint; dtypes of the model and the cache
    "bfloat16": ("gqa_theta1e6_bf16", "bfloat16", "bfloat16"),
    "float32": ("tied_fp32", "float32", "float32"),
    "int8": ("gqa_theta1e6_bf16", "bfloat16", "int8"),
    "int4": ("mqa_fp16_sharded", "float16", "int4"),
}


class Recorder:
    """Stands between engine and model: keeps the logits by the tokens before them."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.rows, self.most_sharing = {}, 0
        self.tokens = {}  # of each block and offset: what lies there

    def forward(self, batch, kv_cache):
        logits = self.model.forward(batch, kv_cache)
        self._look(batch, kv_cache.block_size)
        for slot, token in zip(batch.slot_mapping, batch.token_ids, strict=True):
            self.tokens[int(slot)] = int(token)
        for row, index in enumerate(batch.logit_rows):
            self.rows.setdefault(self._context(batch, int(index), kv_cache), []).append(
                logits[row].tobytes()
            )
        return logits

    def _look(self, batch, block_size):
        """Count the sequences of one step whose first whole split is in the same blocks."""
        blocks = SPLIT // block_size
        long = batch.seq_lens > SPLIT
        heads = [tuple(table[:blocks]) for table in batch.block_tables[long]]
        most = max((heads.count(head) for head in heads), default=0)
        self.most_sharing = max(self.most_sharing, most)

    def _context(self, batch, token, kv_cache):
        """Return the own tokens after the prefix, up to and with a token of the batch."""
        sequence = int(np.searchsorted(batch.cu_seqlens_q, token, side="right")) - 1
        table, size = batch.block_tables[sequence], kv_cache.block_size
        positions = range(len(PREFIX), int(batch.positions[token]) + 1)
        return tuple(self.tokens[int(table[p // size]) * size + p % size] for p in positions)


def run(model, kv_dtype, requests, **options):
    recorder = Recorder(model)
    engine = make_engine(
        recorder, num_blocks=400, block_size=32, kv_dtype=kv_dtype, max_num_batched_tokens=512,
        max_step_seconds=None, **options,
    )  # fmt: skip
    outputs = {}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
        if options.get("prefix_caching") and not outputs:  # the first fills the cache
            while len(outputs.get((name, 0), [])) < 1:
                collect(engine, outputs)
    while engine.has_unfinished():
        collect(engine, outputs)
    return recorder, outputs


def collect(engine, outputs):
    for output in engine.step():
        assert output.error is None, output.error
        outputs.setdefault((output.request_id, output.index), []).extend(output.token_ids)


@pytest.mark.parametrize("name", MODELS)
def test_requests_on_one_cached_prefix(name):
    checkpoint, dtype, kv_dtype = MODELS[name]
    model = tiny_golden(checkpoint).model(dtype)
    rng = np.random.default_rng(5)
    requests = {
        str(i): (
            [*PREFIX, *rng.integers(3, 500, rng.integers(1, 40)).tolist()],
            SamplingParams(max_tokens=int(rng.integers(4, 12)), ignore_eos=True),
        )
        for i in range(6)
    }
    together, outputs = run(model, kv_dtype, requests, prefix_caching=True, max_num_seqs=8)
    assert together.most_sharing == len(requests)
    for request, given in requests.items():
        alone, expected = run(model, kv_dtype, {request: given}, prefix_caching=False)
        assert alone.most_sharing == 1
        assert outputs[request, 0] == expected[request, 0]
        for context, rows in alone.rows.items():
            assert set(together.rows[context]) == set(rows), (request, len(context))


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_one_prompt(name):
    checkpoint, dtype, kv_dtype = MODELS[name]
    model = tiny_golden(checkpoint).model(dtype)
    params = SamplingParams(n=5, max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    together, outputs = run(model, kv_dtype, {"a": (PREFIX, params)}, max_num_seqs=8)
    assert together.most_sharing == 5
    one_by_one, expected = run(model, kv_dtype, {"a": (PREFIX, params)}, max_num_seqs=1)
    assert one_by_one.most_sharing == 1
    assert outputs == expected
    assert len({tuple(ids) for ids in outputs.values()}) > 1  # they do go different ways
    assert together.rows.keys() == one_by_one.rows.keys()
    for context, rows in together.rows.items():
        assert set(rows) == set(one_by_one.rows[context])
