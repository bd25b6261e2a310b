"""The cost of steps is learnt from steps."""

import numpy as np
import pytest

from codellama_rt.engine.sequence import Chunk
from codellama_rt.engine.step_cost import StepCost
from codellama_rt.llm.variants import SHAPES

FIXED, TOKEN, PAIR, KEY = 0.2, 1e-3, 1e-8, 1e-6  # seconds of a made-up machine


def seconds(chunks):
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
    keys = sum(chunk.stop for chunk in chunks)
    return FIXED + TOKEN * len(positions) + PAIR * (positions + 1).sum() + KEY * keys


def learn(cost, chunks):
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
    cost.learn(positions, np.array([chunk.stop for chunk in chunks]), seconds(chunks))


def random_step(rng):
    starts = rng.integers(0, 50_000, rng.integers(1, 9))
    return [Chunk(None, int(start), int(start + rng.integers(1, 500)), 1) for start in starts]


@pytest.mark.parametrize("asks", [False, True])
def test_it_predicts_the_machine_it_has_seen(asks):
    rng, cost = np.random.default_rng(0), StepCost(SHAPES["7b"])
    for _ in range(200):
        learn(cost, random_step(rng))
        if asks:
            assert cost.fixed > 0
    for _ in range(20):
        chunks = random_step(rng)
        assert cost.seconds(chunks) == pytest.approx(seconds(chunks), rel=0.05)
    [chunk] = [Chunk(None, 1000, 1000 + cost.num_tokens(1.0, 1000), 1)]
    assert seconds([chunk]) - FIXED == pytest.approx(1.0, rel=0.1)


def test_chunks_are_whole_groups_of_rows():
    cost = StepCost(SHAPES["7b"])
    counts = {cost.num_tokens(0.1 * i, 1000) for i in range(200)}
    assert min(counts) == 1
    assert max(counts) > 100
    assert all(count < 16 or count % 8 == 0 for count in counts)


def test_when_it_learns_does_not_matter():
    rng = np.random.default_rng(1)
    steps = [random_step(rng) for _ in range(150)]
    late, soon = StepCost(SHAPES["7b"]), StepCost(SHAPES["7b"])
    for step in steps:
        learn(late, step)
        learn(soon, step)
        assert soon.fixed > 0
    assert late.seconds(steps[0]) == pytest.approx(soon.seconds(steps[0]), rel=1e-9)


def test_steps_of_one_kind_are_predicted_though_their_parts_cannot_be_told_apart():
    rng = np.random.default_rng(2)
    for depth in (0, 1_000, 15_000, 90_000):
        cost = StepCost(SHAPES["7b"])
        for i in range(150):
            start = depth + 8 * i
            chunks = [Chunk(None, 200 + i, 201 + i, 1), Chunk(None, start, start + 8, 0)]
            positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
            noise = rng.uniform(0.9, 1.1)
            cost.learn(
                positions, np.array([chunk.stop for chunk in chunks]), noise * seconds(chunks)
            )
        assert cost.seconds(chunks) == pytest.approx(seconds(chunks), rel=0.05)


@pytest.mark.parametrize("shape", ["tiny", "7b", "70b"])
@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-5])
def test_steps_that_take_no_time_leave_a_cost(shape, seconds):
    cost = StepCost(SHAPES[shape])
    for start in range(90_112, 100_000, 512):  # a prompt that nothing computes
        cost.learn(np.arange(start, start + 512), np.array([start + 512]), seconds)
        assert cost.fixed > 0
        assert cost.num_tokens(1.0, start) >= 1
