"""Samples that decode together: their arrays follow from the last step's, and are what they are."""

import logging
from dataclasses import fields

import numpy as np
import pytest
from helpers.faults import Faults
from helpers.paged_fakes import (
    FakeDetokenizer,
    FakeTokenizer,
    HashModel,
    drain,
    drain_interrupted,
    engine_of,
)

from codellama_rt.engine import lineup
from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.sampling_params import SamplingParams


class ComparingModel(HashModel):
    """Compares each batch with the one that is laid out from the sequences themselves."""

    def attach(self, engine):
        self.engine, self.num_compared = engine, 0
        schedule = engine.scheduler.schedule

        def remember():
            self.chunks = schedule()
            return self.chunks

        engine.scheduler.schedule = remember
        return engine

    def forward(self, batch, kv_cache):
        if len(self.chunks) == len(batch.seq_lens):  # else a step is repeated one by one
            expected = build_batch(self.chunks, kv_cache.block_size)
            for field in fields(batch):
                its, own = getattr(batch, field.name), getattr(expected, field.name)
                assert np.array_equal(its, own), field.name
                assert getattr(its, "dtype", None) == getattr(own, "dtype", None), field.name
            self.num_compared += 1
        return super().forward(batch, kv_cache)


def requests(count, **options):
    rng = np.random.default_rng(3)
    for i in range(count):
        params = SamplingParams(max_tokens=int(rng.integers(1, 60)), seed=i, **options)
        yield str(i), rng.integers(3, 60, rng.integers(1, 30)).tolist(), params


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("num_blocks", [60, 2000])
def test_batches_that_follow_are_those_laid_out_anew(num_blocks, block_size, caplog):
    model = ComparingModel()
    engine = model.attach(
        engine_of(2 * num_blocks // block_size, block_size, model=model, max_num_seqs=12)
    )
    for name, prompt, params in requests(30, temperature=1.0):
        engine.add_request(name, prompt, params)
    with caplog.at_level(logging.WARNING, "codellama_rt"):
        drain(engine)
    assert not caplog.records  # a step that failed would be repeated, and give the same tokens
    assert model.num_compared == engine.stats()["steps"]


def test_a_lineup_goes_on_while_nobody_comes_or_goes(monkeypatch):
    made = []

    class Counted(lineup.Lineup):
        def __init__(self, samples, *arguments):
            made.append(len(samples))
            super().__init__(samples, *arguments)

    monkeypatch.setattr("codellama_rt.engine.steps.Lineup", Counted)
    engine = engine_of(200, max_num_seqs=8)
    for i in range(8):
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        engine.add_request(str(i), [1, 2 + i, 3], params)
    drain(engine)
    assert made == [0, 8]


class FailingTokenizer(FakeTokenizer):
    """After a prompt that ends in 63 the third token has no text."""

    def detokenizer(self, prompt_ids, *, skip_special_tokens=True):
        detokenizer = FakeDetokenizer()
        if prompt_ids[-1] == 63:
            push, left = detokenizer.push, iter(range(2))
            detokenizer.push = lambda token_id: push(token_id) + str(next(left))[:0]
        return detokenizer


def test_a_text_that_fails_leaves_the_others_their_tokens():
    def outputs(*prompts):
        engine = engine_of(tokenizer=FailingTokenizer())
        for prompt in prompts:
            params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, seed=prompt[-1])
            engine.add_request(str(prompt[-1]), prompt, params)
        gained = drain(engine)
        return {name: (its.token_ids, its.text, its.end) for (name, _), its in gained.items()}

    good = [[1, 5], [1, 6, 7], [1, 8]]
    expected, found = outputs(*good), outputs(*good[:2], [1, 63], good[2])
    token_ids, _, end = found.pop("63")
    assert (len(token_ids), end) == (2, ("error", None))
    assert found == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_of_a_lineup_that_raises_anywhere_can_be_repeated(error):
    def engine():
        made = engine_of(200, max_num_seqs=8)
        for i in range(5):
            params = SamplingParams(max_tokens=4 + i, temperature=1.0, seed=i, stop=["zz"])
            made.add_request(str(i), [1, 2 + i, 3], params)
        return made

    expected = drain_interrupted(engine(), None, None)
    counting = Faults()
    drain_interrupted(engine(), counting, 3)
    for at in range(0, counting.count, 7):
        faults = Faults(at, error)
        assert drain_interrupted(engine(), faults, 3) == expected, faults.raised_in
