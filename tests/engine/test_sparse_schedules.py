"""Generated tokens that attend chosen blocks: 100 schedules, every bit.

What a token attends depends on its sequence and its place alone. So the schedules of
`test_determinism` must give each row the bits that it has without other requests, also where
generated tokens are computed again after a preemption, or several at once, as proposed.
"""

from collections import Counter

import pytest
from helpers.schedules import run_schedule, undisturbed

from codellama_rt import ops
from codellama_rt.model import sparse_attention

FRACTION = 0.3
HAPPENED = ("preemptions", "hits", "partial hits", "copies", "accepted", "rejected")


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """These have two layers and up to 175 tokens."""
    monkeypatch.setattr(sparse_attention, "DENSE_LAYERS", 1)
    monkeypatch.setattr(sparse_attention, "_LEAST_TOKENS", 64)


@pytest.mark.parametrize("model", ["bf16", "fp32", "mixed", "int8 cache", "int4 cache"])
def test_every_row_is_that_of_the_undisturbed_run(model):
    counts, num_differ = Counter(), 0
    for seed in range(700, 720):
        recorder = run_schedule(model, ops.isa(), seed, sparse_decoding=FRACTION)
        for request, rows in recorder.rows.items():
            expected_rows, expected_tokens = undisturbed(model, ops.isa(), request, FRACTION)
            assert rows == expected_rows, (seed, request)
            for sample, token_ids in expected_tokens.items():
                assert recorder.token_ids[request, sample] == token_ids, (seed, request)
            dense_rows, _ = undisturbed(model, ops.isa(), request)
            num_differ += any(dense_rows.get(key) != bits for key, bits in rows.items())
        counts += recorder.counts
    assert all(counts[name] for name in HAPPENED), counts
    assert num_differ  # some tokens did attend less than everything
