"""A step is a transaction: whatever is raised in it, nothing is lost and it can be repeated."""

import pytest
from helpers.faults import Faults
from helpers.paged_fakes import (
    PROMPT,
    FailingTokenizer,
    HashModel,
    collect,
    drain,
    engine_of,
    greedy_tokens,
)

from codellama_rt.engine.branches import Branches
from codellama_rt.engine.sampling_params import SamplingParams

STRIDE = 47  # every 47th call: all 14,000 take three minutes
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
REQUESTS = {
    "forks": (PROMPT, SamplingParams(n=3, max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)),
    "prompt": (
        [*PROMPT[:5], 20, 21, 22, 23, 24],
        SamplingParams(
            max_tokens=4, ignore_eos=True, prompt_logprobs=1, logprobs=2, repetition_penalty=1.3
        ),
    ),
    "stop": ([*PROMPT, 30], SamplingParams(max_tokens=8, stop=["ab", "c?"], min_tokens=2)),
}


def results(gained):
    return {
        key: (total.token_ids, total.text, total.logprobs, list(total.prompt_logprobs or ()))
        for key, total in gained.items()
    }


def run(num_blocks, step, faults):
    """All requests to their ends, with faults in one step; then what the prefix cache gives."""
    engine = engine_of(num_blocks, max_num_batched_tokens=8, max_num_seqs=4)
    engine.add_request("earlier", PROMPT[:5], SamplingParams(max_tokens=1))
    drain(engine)  # so that the others find a block, and the head of another one
    for name, (prompt, params) in REQUESTS.items():
        engine.add_request(name, prompt, params)
    gained, steps = {}, 0
    while engine.has_unfinished():
        steps += 1
        assert steps < 200, "the engine is stuck"
        try:
            outputs = faults.call(engine.step) if steps == step else engine.step()
        except (KeyboardInterrupt, RuntimeError) as error:
            assert str(error) == "injected"  # noqa: PT017 (any step may raise or not)
        else:
            collect(gained, outputs)
    stats = engine.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks"], "blocks leaked"
    assert stats["prefix_partial_hit_tokens"] >= 2
    assert not engine.table.samples
    first = results(gained)
    for (name, index), (token_ids, *_) in first.items():
        params = SamplingParams(max_tokens=1, logprobs=3, ignore_eos=True)
        engine.add_request(f"{name} {index}", [*REQUESTS[name][0], *token_ids], params)
    return first, results(drain(engine)), steps, stats["preemptions"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_blocks", [64, 8])
def test_a_step_that_raises_at_any_call_can_be_repeated(num_blocks, error):
    *expected, num_steps, preemptions = run(num_blocks, None, None)
    assert (preemptions > 0) == (num_blocks == 8)
    offset = 0
    for step in range(1, num_steps + 1):
        counting = Faults()
        run(num_blocks, step, counting)
        for at in range(offset, counting.count, STRIDE):
            faults = Faults(at, error)
            *found, _, _ = run(num_blocks, step, faults)
            assert found == expected, f"step {step}: {faults.raised_in}"
        offset = (offset + 5) % STRIDE


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_branches_that_were_interrupted_go_on(error):
    def run(at):
        engine, rows, faults = engine_of(9, max_num_batched_tokens=8), [], Faults(at, error)
        engine.add_request("r", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
        engine.step()
        with Branches(engine) as branches:
            live = [branches.add([*PROMPT, 20]), branches.add([*PROMPT, 21])]
            for _ in range(4):
                try:
                    found = faults.call(branches.logits, live)
                except (KeyboardInterrupt, RuntimeError):
                    found = branches.logits(live)
                rows.append(found.tobytes())
                live = [branches.fork(live[0]), *live[:2]]
                for branch, token_id in zip(live, (3, 4, 5), strict=False):
                    branches.append(branch, token_id)
                for branch in set(branches.live) - set(live):
                    branches.drop(branch)
        tokens = [token_id for o in drain(engine).values() for token_id in o.token_ids]
        return rows, tokens, faults.count

    *expected, count = run(None)
    assert expected[1] == greedy_tokens()[1:]
    for at in range(0, count, STRIDE):
        assert list(run(at)[:2]) == expected


def test_a_copy_that_failed_is_made_before_the_step_is_repeated():
    engine = engine_of()
    params = SamplingParams(n=3, max_tokens=12, ignore_eos=True, temperature=1.0, seed=5)
    engine.add_request("r", PROMPT, params)
    copy_blocks, calls = engine.kv_cache.copy_blocks, []

    def fail_at_first(pairs):
        calls.append(len(pairs))
        if len(calls) == 1:
            copy_blocks(pairs[:1])
            raise MemoryError("injected")
        copy_blocks(pairs)

    engine.kv_cache.copy_blocks = fail_at_first
    collect(gained := {}, engine.step())
    with pytest.raises(MemoryError, match="injected"):
        engine.step()
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert calls[:2] == [2, 2]
    undisturbed = engine_of()
    undisturbed.add_request("r", PROMPT, params)
    assert results(gained) == results(drain(undisturbed))


# Faults of one request


class PoisonedModel(HashModel):
    """Raises when a step holds the poisoned token; `passing` times only, if that is set."""

    def __init__(self, poison, passing=None):
        super().__init__()
        self.poison, self.passing = poison, passing

    def forward(self, batch, kv_cache):
        if self.poison in batch.token_ids and self.passing != 0:
            self.passing = None if self.passing is None else self.passing - 1
            raise MemoryError("poison")
        return super().forward(batch, kv_cache)


def test_requests_that_fail_the_model_end_and_the_others_go_on():
    engine = engine_of(model=PoisonedModel(poison=33))
    params, gained = SamplingParams(max_tokens=12, ignore_eos=True), {}
    engine.add_request("bad", [*PROMPT, 33], params)
    engine.add_request("good", PROMPT, params)
    engine.add_request("also bad", [33], params)
    collect(gained, engine.step())
    engine.add_request("late and bad", [5, 33], params)
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained.pop(("good", 0)).token_ids == greedy_tokens()
    assert sorted(gained) == [("also bad", 0), ("bad", 0), ("late and bad", 0)]
    assert {total.end for total in gained.values()} == {("error", None)}
    assert engine.scheduler.blocks.num_free == 64


def test_every_sample_of_a_failed_prompt_ends_with_the_model_s_error():
    engine = engine_of(model=PoisonedModel(poison=33))
    engine.add_request("bad", [*PROMPT, 33], SamplingParams(n=3, max_tokens=3))
    gained = drain(engine)
    assert list(gained) == [("bad", 0), ("bad", 1), ("bad", 2)]
    for total in gained.values():
        assert (total.end, total.token_ids) == (("error", None), [])
        assert str(total.error) == "poison"


def test_what_fails_once_is_repeated_without_a_trace():
    engine = engine_of(model=PoisonedModel(poison=PROMPT[-1], passing=1))
    params = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
    engine.add_request("r", PROMPT, params)
    assert [total.token_ids for total in drain(engine).values()] == [greedy_tokens()] * 2


def test_a_sample_that_cannot_be_decoded_ends_without_the_failing_token():
    engine = engine_of(tokenizer=FailingTokenizer(greedy_tokens()[3]))
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    total = drain(engine)["r", 0]
    assert total.token_ids == greedy_tokens()[:3]
    assert (total.text, total.end) == ("...", ("error", None))
