"""Choosing for all sequences at once: each has what it would have alone, faults included."""

import numpy as np
import pytest

from codellama_rt.engine.logprobs import token_logprobs
from codellama_rt.engine.sampler import ForbiddenTokens, TokenCounts, TokenSampler, choose
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import CorruptLogitsError

VOCAB_SIZE = 70


def no_odd_tokens(token_ids, logits):
    logits[1::2] = -np.inf
    return logits


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),
    SamplingParams(temperature=1.2, top_k=10**12, min_p=0.1, logprobs=0),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, logit_bias={3: 2.0, 9: -100}),
    SamplingParams(temperature=1.0, allowed_token_ids=[2, 40, 69], logprobs=20),
    SamplingParams(temperature=0.7, presence_penalty=-1.0, min_tokens=9),
    SamplingParams(temperature=0.9, logits_processors=[no_odd_tokens], logprobs=2),
]
NUM_ROWS = len(PARAMS)


def samplers_of(params=PARAMS, constraint=None):
    """One sampler each, some tokens into its output."""
    samplers = []
    for i, own in enumerate(params):
        sampler = TokenSampler(
            own, 11, i, [1, 5, 5], VOCAB_SIZE, {0, 4}, f"r{i}", [[7], [8, 6]], constraint
        )
        for token_id in (5, 30 + i, 8):
            sampler.record(token_id)
        samplers.append(sampler)
    return samplers


def logits_of(num_rows=NUM_ROWS, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (num_rows, VOCAB_SIZE)).astype(np.float32)


def test_together_as_alone():
    samplers = samplers_of()
    for seed in range(20):
        logits = logits_of(seed=seed)
        before, positions = logits.copy(), [9 + seed + i for i in range(NUM_ROWS)]
        together = choose(samplers, logits, positions)
        for i, sampler in enumerate(samplers):
            assert choose([sampler], logits[i : i + 1], positions[i : i + 1]) == [together[i]]
        np.testing.assert_array_equal(logits, before)
        assert together[6].token_id % 2 == 0
        assert together[4].token_id in (2, 40, 69)
        assert not {7, 6} & {choice.token_id for choice in together}


def test_logprobs_are_those_of_the_raw_logits():
    logits = logits_of()
    for choice, params, row in zip(
        choose(samplers_of(), logits, [9] * NUM_ROWS), PARAMS, logits, strict=True
    ):
        if params.logprobs is None:
            assert choice.logprobs is None
        else:
            assert choice.logprobs == token_logprobs(row, choice.token_id, params.logprobs)


def test_samples_may_share_a_row():
    logits, order = logits_of(2), [1, 0, 0, 1, 1, 0, 1]
    shared = choose(samplers_of(), logits, [9] * NUM_ROWS, order)
    assert shared == choose(samplers_of(), logits[order], [9] * NUM_ROWS)


def test_what_fails_fails_alone():
    def failing(token_ids, logits):
        raise LookupError("three")

    class Broken:
        def accept(self, token_id):
            pass

        def mask(self):
            raise ArithmeticError("grammar")

    bad = [
        *samplers_of([SamplingParams(logits_processors=[failing])]),
        *samplers_of([SamplingParams(temperature=1.0)], Broken()),
        *samplers_of([SamplingParams(allowed_token_ids=[7], logprobs=1)]),
    ]
    logits = logits_of(NUM_ROWS + 4)
    logits[-1, 5] = np.nan
    mixed = [bad[0], *samplers_of(), bad[1], bad[2], samplers_of()[6]]
    results = choose(mixed, logits, [9] * len(mixed))
    errors = {i: type(r) for i, r in enumerate(results) if isinstance(r, Exception)}
    expected = {0: LookupError, 8: ArithmeticError, 9: RuntimeError, 10: CorruptLogitsError}
    assert errors == expected
    assert results[1:8] == choose(samplers_of(), logits[1:8], [9] * NUM_ROWS)
    with pytest.raises(RuntimeError, match=r"request 'r0': no token .* is -inf"):
        raise results[9]
    with pytest.raises(RuntimeError, match=r"request 'r6': no token .* token 5, is nan"):
        raise results[10]


def test_a_constraint_joins_the_other_restrictions():
    class Multiples:
        def accept(self, token_id):
            pass

        def mask(self):
            bits = np.arange(96) % 5 == 0
            return np.packbits(bits, bitorder="little").view(np.uint32)

    hot = SamplingParams(temperature=100.0, seed=1)
    allowed = SamplingParams(temperature=100.0, allowed_token_ids=[5, 6, 10, 11])
    one, other = samplers_of([hot, allowed], Multiples())
    drawn = [choose([one, other], logits_of(2), [p, p]) for p in range(200)]
    assert {c.token_id for c, _ in drawn} == set(range(0, VOCAB_SIZE, 5))
    assert {c.token_id for _, c in drawn} == {5, 10}


def test_no_samplers():
    assert choose([], logits_of(0), []) == []


def test_counts_are_those_of_the_tokens():
    rng = np.random.default_rng(3)
    prompt, output = rng.integers(0, 50, 40).tolist(), rng.integers(0, 50, 60).tolist()
    counts = TokenCounts(prompt)
    for token_id in output:
        counts.add(token_id)
    expected = {token_id: output.count(token_id) for token_id in (*prompt, *output)}
    assert dict(zip(counts.token_ids, counts.counts, strict=True)) == expected
    assert len(counts.token_ids) == len(expected)


def test_without_restrictions_there_is_no_mask():
    assert ForbiddenTokens(VOCAB_SIZE, runs=[[1, 2]]).allowed is None
