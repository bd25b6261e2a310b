"""Speculation changes when tokens come, and no token, text or log-probability."""

from array import array

import numpy as np
import pytest
from helpers.faults import Faults
from helpers.paged_fakes import (
    PROMPT,
    FailingTokenizer,
    check_outputs,
    collect,
    drain,
    engine_of,
    plain,
)
from helpers.speculating import RepeatingModel, speculate_always, speculate_at_random

from codellama_rt.engine.row_cost import TRIED, RowCost
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.sequence import Sequence
from codellama_rt.engine.speculation import Corpora, Speculation
from codellama_rt.engine.step_cost import StepCost
from codellama_rt.llm.variants import SHAPES


def squash(token_ids, logits):
    """A processor that depends on the tokens before."""
    logits[(sum(token_ids) + len(token_ids)) % len(logits)] += 3.0
    return logits


def random_request(rng):
    prompt = [1, *range(3, 3 + int(rng.integers(0, 12)))]
    prompt += rng.integers(3, 14, rng.integers(0, 30)).tolist()
    wants = rng.random() < 0.3
    most = int(rng.integers(1, 50))
    params = SamplingParams(
        n=int(rng.choice([1, 1, 1, 2, 4])),
        max_tokens=most,
        min_tokens=int(min(most, rng.choice([0, 0, 6]))),
        temperature=float(rng.choice([0.0, 0.7, 1.2])),
        top_p=float(rng.choice([1.0, 0.9])),
        top_k=int(rng.choice([0, 20])),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.1])),
        presence_penalty=float(rng.choice([0.0, 0.0, 0.5])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.2])),
        logit_bias={5: 1.0} if rng.random() < 0.2 else None,
        allowed_token_ids=tuple(range(2, 16)) if rng.random() < 0.2 else None,
        logits_processors=(squash,) if rng.random() < 0.1 else (),
        seed=int(rng.integers(1000)),
        stop=("ab", "hgf", "ad") if rng.random() < 0.3 else (),
        stop_token_ids=(11,) if rng.random() < 0.2 else (),
        ignore_eos=bool(rng.random() < 0.5),
        logprobs=2 if wants else None,
        prompt_logprobs=2 if wants else None,
    )
    return prompt, params


@pytest.fixture(scope="module")
def requests():
    """(prompt, params, what each sample gets without speculation and others)."""
    rng = np.random.default_rng(11)
    found = []
    for prompt, params in [random_request(rng) for _ in range(60)]:
        engine = engine_of(1, 4096, model=RepeatingModel(), max_num_batched_tokens=4096)
        engine.add_request("alone", prompt, params)
        found.append((prompt, params, [plain(t) for _, t in sorted(drain(engine).items())]))
    return found


@pytest.mark.parametrize("seed", range(100))
def test_outputs_are_those_without_speculation(requests, seed):
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([1, 4, 16]))
    engine = engine_of(
        int(rng.choice([150, 400, 2000])) // block_size,
        block_size,
        model=RepeatingModel(),
        max_num_seqs=int(rng.integers(1, 33)),
        max_num_batched_tokens=int(rng.choice([16, 33, 64, 512])),
        prefix_caching=bool(rng.integers(2)),
        speculation="suffix",
    )
    speculate_at_random(engine, rng)
    rng.shuffle(engine.scheduler.blocks._free)
    pending = rng.choice(len(requests), int(rng.integers(1, 33)), replace=False).tolist()
    chosen, unwanted, gained, drafts = list(pending), set(), {}, {}
    while pending or engine.has_unfinished():
        while pending and rng.random() < 0.5:
            i = pending.pop()
            prompt, params, _ = requests[i]
            engine.add_request(str(i), prompt, params, priority=int(rng.integers(3)))
        if engine.scheduler.running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        if engine.table.requests and rng.random() < 0.02:
            name = str(rng.choice(list(engine.table.requests)))
            unwanted.add(name)
            collect(gained, engine.abort(name))
        outputs = engine.step()
        collect(gained, outputs)
        drafts |= {one.request_id: one.metrics for one in outputs}
    stats = engine.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks"]
    assert stats["accepted_tokens"] <= stats["draft_tokens"]
    check_outputs(requests, chosen, gained, unwanted)
    for name in ("draft_tokens", "accepted_tokens"):
        assert stats[name] == sum(getattr(metrics, name) for metrics in drafts.values())


def test_tokens_are_accepted_at_all(requests):
    engine = engine_of(400, model=RepeatingModel(), max_num_seqs=8, speculation="suffix")
    speculate_at_random(engine, np.random.default_rng(0))
    for i, (prompt, params, _) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    drain(engine)
    stats = engine.stats()
    assert stats["accepted_tokens"] > 0.2 * stats["generated_tokens"]
    assert stats["accepted_tokens"] < stats["draft_tokens"]


STRIDE = 83
REQUESTS = {
    "forks": (PROMPT, SamplingParams(n=2, max_tokens=12, temperature=0.7, seed=3, ignore_eos=True)),
    "penalties": (
        [*PROMPT[:5], 3, 4, 5, 3, 4],
        SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2, repetition_penalty=1.05),
    ),
    "stop": ([*PROMPT, 8, 9], SamplingParams(max_tokens=16, stop=["hgf"], min_tokens=2)),
}


def run(num_blocks, step, faults):
    engine = engine_of(
        num_blocks, model=RepeatingModel(), max_num_batched_tokens=24, speculation="suffix"
    )
    speculate_always(engine)
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
    assert stats["accepted_tokens"] > 0
    first = {key: plain(total) for key, total in gained.items()}
    for (name, index), (token_ids, *_) in first.items():  # what the prefix cache holds by now
        params = SamplingParams(max_tokens=1, logprobs=3, ignore_eos=True)
        engine.add_request(f"{name} {index}", [*REQUESTS[name][0], *token_ids], params)
    return first, {key: plain(total) for key, total in drain(engine).items()}, steps


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_blocks", [64, 16])
def test_a_step_that_raises_at_any_call_can_be_repeated(num_blocks, error):
    *expected, num_steps = run(num_blocks, None, None)
    offset = 0
    for step in range(1, num_steps + 1):
        counting = Faults()
        run(num_blocks, step, counting)
        for at in range(offset, counting.count, STRIDE):
            faults = Faults(at, error)
            *found, _ = run(num_blocks, step, faults)
            assert found == expected, f"step {step}: {faults.raised_in}"
        offset = (offset + 5) % STRIDE


class PoisonedModel(RepeatingModel):
    """Raises when a step holds a token that no output has."""

    def forward(self, batch, kv_cache):
        if 40 in batch.token_ids[batch.positions >= 8]:
            raise MemoryError("poison")
        return super().forward(batch, kv_cache)


def proposing(engine, tokens):
    """Have the engine propose these tokens after each one."""
    engine.steps.speculation.propose = lambda sequences, drafters, most: [
        array("i", tokens[: max(0, min(len(tokens), one.prompt_len + 11 - len(one.token_ids)))])
        if drafter
        else array("i")
        for one, drafter in zip(sequences, drafters, strict=True)
    ]


def outcome(model, params, proposed=None, tokenizer=True):
    kind = {} if proposed is None else {"speculation": "suffix"}
    engine = engine_of(model=model, tokenizer=tokenizer, **kind)
    if proposed is not None:
        proposing(engine, proposed)
    engine.add_request("r", PROMPT, params)
    total = drain(engine)["r", 0]
    return total.token_ids, total.text, total.end, repr(total.error)


def test_a_proposal_that_fails_the_model_is_dropped():
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = outcome(RepeatingModel(), params)
    assert expected[2] == ("length", None)
    assert outcome(PoisonedModel(), params, [40, 41]) == expected


def test_logits_that_are_nan_end_the_output_where_they_are_met():
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = outcome(RepeatingModel(), params)[0]
    expected = outcome(RepeatingModel(nan_token=tokens[4]), params)
    assert (expected[0], expected[2]) == (tokens[:5], ("error", None))
    for proposed in (tokens[1:], tokens[3:6], [40, 41], tokens[4:5]):
        assert outcome(RepeatingModel(nan_token=tokens[4]), params, proposed) == expected


def test_a_token_that_cannot_be_decoded_ends_the_output_before_it():
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = outcome(RepeatingModel(), params)[0]
    bad = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    tokenizer = FailingTokenizer(tokens[bad])
    expected = outcome(RepeatingModel(), params, tokenizer=tokenizer)
    assert expected[0] == tokens[:bad]
    assert outcome(RepeatingModel(), params, tokens[1:], tokenizer=tokenizer) == expected


def test_all_of_a_right_proposal_is_taken_in_one_step():
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = outcome(RepeatingModel(), params)[0]
    engine = engine_of(model=RepeatingModel(), speculation="suffix")
    proposing(engine, tokens[1:])
    engine.add_request("r", PROMPT, params)
    first, second = engine.step(), engine.step()
    assert [one.token_ids for one in (*first, *second)] == [tokens[:1], tokens[1:]]
    assert second[0].finish_reason == "length"
    metrics = second[0].metrics
    assert (metrics.draft_tokens, metrics.accepted_tokens) == (10, 10)
    assert metrics.output_tokens == 12
    assert engine.stats()["draft_tokens"] == engine.stats()["accepted_tokens"] == 10
    assert engine.stats()["drafts"] == {10: 1}


def test_outputs_that_have_ended_are_copied():
    engine = engine_of(model=RepeatingModel(), speculation="suffix")
    speculation = engine.steps.speculation
    speculate_always(engine)
    speculation.acceptance.rates = [0.9] * 7
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    engine.add_request("first", PROMPT, params)
    tokens = drain(engine)["first", 0].token_ids
    assert len(speculation.corpora) == 11
    engine.add_request("second", PROMPT, params)
    steps = engine.stats()["steps"]
    assert drain(engine)["second", 0].token_ids == tokens
    assert engine.stats()["steps"] - steps < steps


def test_outputs_of_other_salts_are_not_copied():
    engine = engine_of(model=RepeatingModel(), speculation="suffix")
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    engine.add_request("first", PROMPT, params, cache_salt="one")
    drain(engine)
    [salt] = engine.steps.speculation.corpora._texts
    assert salt.caller == "one"
    engine.add_request("second", PROMPT, params, cache_salt="two")
    drain(engine)
    assert [its.caller for its in engine.steps.speculation.corpora._texts] == ["one", "two"]
    engine.reset_prefix_cache()
    assert len(engine.steps.speculation.corpora) == 0


def test_what_nobody_copies_goes_first():
    corpora = Corpora(max_tokens=40)
    for i in range(5):
        corpora.add("a", array("i", [i] * 8))
        assert len(corpora) <= 40
    assert [len(text) for text in corpora.get("a")] == [9, 18]
    corpora.add("b", array("i", [7] * 100))  # its end alone
    assert [len(text) for text in corpora.get("b")] == [20]
    assert corpora.get("a") == []
    corpora.add("c", array("i", [7] * 12))
    corpora.add("b", array("i", [7] * 4))
    assert [[len(text) for text in corpora.get(name)] for name in "bc"] == [[5, 20], [13]]
    corpora.add("d", array("i", [7] * 12))
    assert [[len(text) for text in corpora.get(name)] for name in "bcd"] == [[5, 20], [], [13]]


def seconds_of(times):
    """A cost of rows that was measured for these numbers of rows."""
    cost = RowCost(StepCost(SHAPES["7b"]))
    for rows, seconds in times.items():
        cost.note(rows, seconds)
    return cost


def test_as_many_are_proposed_as_pay():
    speculation = Speculation(SHAPES["7b"])
    [sequence] = [Sequence(array("i", [1] * 4), 4, (0, 0, 0), first_logit=3)]
    flat = {rows: 1.0 for rows in TRIED}
    steep = {rows: float(rows) for rows in TRIED}
    speculation.rows = seconds_of(flat)
    assert speculation._best_count([sequence], [0.9**i for i in range(1, 40)]) == 39
    assert speculation._best_count([sequence], [0.02]) == 0  # not worth the doubt
    speculation.rows = seconds_of(steep)
    assert speculation._best_count([sequence], [0.99**i for i in range(1, 40)]) == 0
    speculation.rows = seconds_of(flat | {rows: 8.0 for rows in TRIED if rows > 8})
    assert speculation._best_count([sequence], [0.95**i for i in range(1, 40)]) == 7
    assert speculation._best_count([sequence] * 4, [0.95**i for i in range(1, 40)]) == 4


def test_a_cost_that_changed_is_learned_again():
    cost = seconds_of({1: 1.0, 8: 2.0})
    assert 1.0 <= cost.seconds(4) <= 2.0 <= cost.seconds(16)
    for _ in range(2000):
        cost.note(1, 1.0)
    assert cost.seconds(8) < 1.0  # worth another look
    cost.note(8, 50.0)  # another program had the CPU
    assert cost.seconds(8) < 1.0
    for _ in range(100):
        cost.note(8, 3.0)
    assert cost.seconds(8) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["", "ngram", True, 1])
def test_other_speculation_is_refused(name):
    with pytest.raises(ValueError, match=r"speculation must be None or one of \('suffix',\)"):
        engine_of(speculation=name)
