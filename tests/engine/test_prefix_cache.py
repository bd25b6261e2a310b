"""What requests find in the prefix cache: heads of blocks, only of their salt, and of no reset."""

import asyncio

import pytest
from helpers.paged_fakes import PROMPT, HashModel, collect, drain, engine_of, greedy_tokens

from codellama_rt.engine.async_engine import AsyncEngine
from codellama_rt.engine.branches import Branches
from codellama_rt.engine.sampling_params import SamplingParams

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
SIX = SamplingParams(max_tokens=6, ignore_eos=True)


def cached_tokens(engine, name, prompt, **options):
    engine.add_request(name, prompt, ONE, **options)
    return drain(engine)[name, 0].metrics.cached_tokens


def alone(prompt, params=SIX):
    engine = engine_of(prefix_caching=False)
    engine.add_request("alone", prompt, params)
    return drain(engine)["alone", 0].token_ids


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("num_common", range(1, 12))
def test_a_prompt_is_computed_from_its_first_new_token_on(block_size, num_common):
    engine = engine_of(block_size=block_size)
    first = list(range(3, 15))
    engine.add_request("a", first, SIX)
    drain(engine)
    second = [*first[:num_common], *range(40, 46)]
    engine.add_request("b", second, SIX)
    found = drain(engine)["b", 0]
    assert found.metrics.cached_tokens == num_common
    assert found.token_ids == alone(second)
    stats = engine.stats()
    assert stats["prefix_hit_tokens"] == num_common
    assert stats["prefix_partial_hit_tokens"] == num_common % block_size
    assert stats["computed_tokens"] == 12 + 5 + len(second) - num_common + 5


def test_a_conversation_goes_on_behind_the_last_answer():
    engine = engine_of(block_size=16)
    engine.add_request("a", PROMPT, SIX)
    answer = drain(engine)["a", 0].token_ids
    prompt = [*PROMPT, *answer, 20, 21]
    # The last token of an answer is chosen and not computed.
    assert cached_tokens(engine, "b", prompt) == len(prompt) - 3
    assert engine.scheduler.blocks.copies == {}


def test_the_tail_of_a_running_prompt_is_shared():
    engine = engine_of(block_size=16)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    collect(gained := {}, engine.step())
    engine.add_request("b", PROMPT, params)
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained["b", 0].metrics.cached_tokens == len(PROMPT) - 1
    assert gained["a", 0].token_ids == gained["b", 0].token_ids == greedy_tokens()


def test_a_preempted_sequence_finds_what_it_had():
    engine = engine_of(block_size=4)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(4):
        engine.step()
    before = engine.stats()["computed_tokens"]
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.step()
    assert engine.stats()["computed_tokens"] == before + 1


def test_only_equal_salts_share():
    engine = engine_of()
    assert cached_tokens(engine, "1", PROMPT) == 0
    assert cached_tokens(engine, "2", PROMPT, cache_salt="a") == 0
    assert cached_tokens(engine, "3", PROMPT, cache_salt="b") == 0
    assert cached_tokens(engine, "4", PROMPT, cache_salt="a") == len(PROMPT) - 1
    assert cached_tokens(engine, "5", PROMPT) == len(PROMPT) - 1


def test_samples_of_a_request_keep_its_salt():
    engine = engine_of(num_blocks=12)
    params = SamplingParams(n=3, max_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
    engine.add_request("a", PROMPT, params, cache_salt="a")
    drain(engine)
    parents = {parent for parent, _ in engine.scheduler.blocks._index}
    roots = [parent for parent in parents if isinstance(parent, tuple)]
    assert [salt.caller for (salt,) in roots] == ["a"]


def test_branches_have_a_salt():
    engine = engine_of()
    for salt, found in (("a", 0), ("b", 0), ("a", len(PROMPT) - 1)):
        before = engine.stats()["prefix_hit_tokens"]
        with Branches(engine) as branches:
            branches.logits([branches.add(PROMPT, cache_salt=salt)])
        assert engine.stats()["prefix_hit_tokens"] - before == found


@pytest.mark.parametrize(
    ("salt", "error", "message"),
    [
        (3, TypeError, "cache_salt must be a str or None, got int"),
        ("", ValueError, "cache_salt must not be empty"),
    ],
)
def test_a_salt_is_a_text(salt, error, message):
    engine = engine_of()
    with pytest.raises(error, match=message):
        engine.add_request("a", PROMPT, cache_salt=salt)
    assert not engine.has_unfinished()


def test_after_a_reset_everything_is_computed_again():
    engine = engine_of()
    assert engine.reset_prefix_cache()
    assert cached_tokens(engine, "a", PROMPT) == 0
    assert engine.reset_prefix_cache()
    assert cached_tokens(engine, "b", PROMPT) == 0
    assert cached_tokens(engine, "c", PROMPT) == len(PROMPT) - 1


def test_a_reset_hides_what_runs_and_changes_none_of_it():
    engine, gained = engine_of(block_size=2), {}
    params = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    collect(gained, engine.step())
    collect(gained, engine.step())
    with Branches(engine) as branches:
        branches.logits([branches.add([*PROMPT, 30])])
        assert engine.reset_prefix_cache() is False
        engine.add_request("b", PROMPT, params)
        while engine.has_unfinished():
            collect(gained, engine.step())
    assert gained["b", 0].metrics.cached_tokens == 0
    assert {tuple(total.token_ids) for total in gained.values()} == {tuple(greedy_tokens())}
    assert engine.reset_prefix_cache() is True
    assert not engine.scheduler.blocks._index


def test_a_reset_from_inside_a_step_is_refused():
    class Model(HashModel):
        def forward(self, batch, kv_cache):
            with pytest.raises(RuntimeError, match="from inside its own step"):
                engine.reset_prefix_cache()
            return super().forward(batch, kv_cache)

    engine = engine_of(model=Model())
    engine.add_request("a", PROMPT, ONE)
    assert drain(engine)["a", 0].token_ids == greedy_tokens()[:1]


def test_an_async_engine_resets_between_two_steps():
    async def main():
        async with AsyncEngine(engine_of()) as engine:
            found = []
            for salt in (None, "a", None):
                outputs = engine.generate(PROMPT, SIX, cache_salt=salt)
                found.append([output.metrics.cached_tokens async for output in outputs][-1])
            assert await engine.reset_prefix_cache()
            outputs = engine.generate(PROMPT, SIX)
            return [*found, [output.metrics.cached_tokens async for output in outputs][-1]]

    assert asyncio.run(main()) == [0, 0, len(PROMPT) - 1, 0]
