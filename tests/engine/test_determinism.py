"""Logits are a function of the weights and of a sequence's own tokens: 500 schedules, every bit.

Each schedule runs a random selection of requests with another batch size, token budget, bound on
the time of a step, block size, placement of blocks, amount of KV memory, number of threads, order
of arrival, priorities, and preemptions and resets of the prefix cache at random steps; every third
request has a salt, a quarter of them are bound to a grammar; in every second schedule tokens are
proposed, right and wrong ones. Every row of logits that the engine uses must equal, bit for bit,
the row the same request got when it ran alone in ample memory, and so must the tokens.
"""

from collections import Counter

import pytest
from helpers.schedules import run_schedule, undisturbed

from codellama_rt import ops

BEST, *OTHERS = ops.available_isas()
QUANTIZED = ["int8 cache", "int4 cache", "int8 weights", "int4 weights", "int4 both"]
HAPPENED = ("preemptions", "hits", "partial hits", "copies", "forms", "accepted", "rejected")
GROUPS = [  # model, instruction set, seeds
    *[("bf16", BEST, range(first, first + 10)) for first in range(0, 90, 10)],
    *[("fp32", BEST, range(first, first + 10)) for first in range(100, 190, 10)],
    ("mixed", BEST, range(200, 210)),
    ("dynamic", BEST, range(300, 310)),
    *[("bf16", isa, range(400, 405)) for isa in OTHERS],
    *[(model, BEST, range(first, first + 20)) for model in QUANTIZED for first in (500, 520, 540)],
    *[("int4 both", isa, range(600, 605)) for isa in OTHERS],
]


@pytest.mark.parametrize(("model", "isa", "seeds"), GROUPS)
def test_every_row_is_that_of_the_undisturbed_run(model, isa, seeds):
    counts = Counter()
    for seed in seeds:
        recorder = run_schedule(model, isa, seed)
        for request, rows in recorder.rows.items():
            expected_rows, expected_tokens = undisturbed(model, isa, request)
            assert rows.keys() == expected_rows.keys(), (seed, request)
            differ = [key for key, bits in rows.items() if bits != expected_rows[key]]
            assert not differ, f"seed {seed}, request {request}: (sample, position) {differ[:3]}"
            for sample, token_ids in expected_tokens.items():
                assert recorder.token_ids[request, sample] == token_ids, (seed, request)
        counts += recorder.counts
    # Were one of these never to happen, the test would prove less than it says.
    assert all(counts[name] for name in HAPPENED), counts
