"""Sampling against Transformers' goldens and as a distribution; logprobs against a softmax."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from codellama_rt.engine.logprobs import Logprob, PromptLogprobs, token_logprobs
from codellama_rt.engine.sampler import TokenSampler, choose
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.ops.reference_sampling import distribution, draw, process, uniform

GREEDY = SamplingParams()
# Processors of Transformers that SamplingParams lacks; test_generation has them.
NOT_OURS = {"typical_p", "no_repeat_ngram_size", "epsilon_cutoff"}


def logits_of(size=50, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


def sampler(params, *, seed=0, index=0, prompt_ids=(1,), vocab_size=50, end_ids=()):
    return TokenSampler(params, seed, index, prompt_ids, vocab_size, end_ids, "r1")


def token(chooser, logits, position=1):
    """The chosen token; what chooses it raises for it alone."""
    [choice] = choose([chooser], logits[None], [position])
    if isinstance(choice, Exception):
        raise choice
    return choice.token_id


def probabilities(logits, params, prompt_ids=(), output_ids=()):
    """The distribution that a token is drawn from, by its definition."""
    counts = Counter(output_ids)
    seen = np.array(sorted({*prompt_ids, *counts}), np.int32)
    scores = process(
        logits,
        (seen, np.array([counts[token_id] for token_id in seen.tolist()])),
        (np.empty(0, np.int32), np.empty(0)),
        None,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    probs = np.zeros(len(logits))
    if params.is_greedy:
        probs[scores.argmax()] = 1.0
        return probs
    settings = params.temperature, params.top_k, params.top_p, params.min_p
    token_ids, kept = distribution(scores, *settings)
    probs[token_ids] = kept
    return probs


def test_probabilities_equal_the_goldens(shared_dir):
    num_cases = 0
    for path in sorted((shared_dir / "data" / "tiny").glob("*/golden.json")):
        golden, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        index = golden["sampling"]["prompt_index"]
        logits, prompt_ids = arrays[f"logits_{index}"][-1], golden["cases"][index]["prompt"]
        for case in golden["sampling"]["cases"]:
            if NOT_OURS & set(case["config"]):
                continue
            params = SamplingParams(**{"temperature": 1.0, **case["config"]})
            ours, theirs = probabilities(logits, params, prompt_ids), arrays[case["npz_key"]]
            rounding = 2.0**-11 * theirs if theirs.dtype == np.float16 else 0.0
            assert np.all(np.abs(ours - theirs) <= 1e-5 + rounding), (path.parent.name, case)
            assert np.count_nonzero(ours) == case["kept"], (path.parent.name, case)
            num_cases += 1
    assert num_cases == 13 * 11


def test_greedy_is_the_first_highest():
    logits = np.float32([0, 3, 1, 3])
    assert token(sampler(GREEDY, vocab_size=4), logits) == 1
    assert probabilities(logits, GREEDY).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_tiniest_temperature_is_greedy(temperature):
    probs = probabilities(logits_of(), SamplingParams(temperature=temperature))
    assert probs.max() == 1.0
    assert probs.argmax() == logits_of().argmax()


def test_a_huge_temperature_is_uniform():
    probs = probabilities(logits_of(), SamplingParams(temperature=1e308))
    np.testing.assert_allclose(probs, 1 / 50)


def test_top_k_keeps_equals_and_may_exceed_the_vocabulary():
    logits = np.float32([1, 2, 2, 0])
    kept = probabilities(logits, SamplingParams(temperature=1, top_k=1)) > 0
    assert kept.tolist() == [False, True, True, False]
    everything = probabilities(logits, SamplingParams(temperature=1, top_k=10**30))
    np.testing.assert_allclose(everything, softmax(logits))


def test_top_p_keeps_while_the_mass_before_is_at_most_p():
    logits = np.log(np.float32([0.125, 0.5, 0.25, 0.125]))
    for top_p, kept in [
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 2]),
        (0.76, [0, 1, 2]),
        (0.9, range(4)),
    ]:
        probs = probabilities(logits, SamplingParams(temperature=1, top_p=top_p))
        assert np.flatnonzero(probs).tolist() == list(kept), top_p
    equal = probabilities(np.zeros(4, np.float32), SamplingParams(temperature=1, top_p=0.5))
    assert np.flatnonzero(equal).tolist() == [0, 1, 2]  # Meta: before <= p, so p itself counts


def test_top_p_equals_a_full_sort():
    for seed, top_p, scale in itertools.product(range(20), (0.05, 0.5, 0.9, 0.999), (0.1, 1, 5)):
        logits = logits_of(300, seed, scale).round(1)  # with equals
        order = np.argsort(-softmax(logits), kind="stable")
        before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
        kept = np.sort(order[before <= top_p])
        probs = probabilities(logits, SamplingParams(temperature=1, top_p=top_p))
        assert np.flatnonzero(probs).tolist() == kept.tolist()


def test_min_p_compares_with_the_likeliest():
    logits = np.log(np.float32([0.6, 0.3, 0.06, 0.04]))
    probs = probabilities(logits, SamplingParams(temperature=1, min_p=0.45))
    np.testing.assert_allclose(probs, [2 / 3, 1 / 3, 0, 0], rtol=1e-6)


def test_penalties_see_the_right_tokens():
    logits = np.float32([2, -2, 2, -2, 2])
    prompt, output = [0, 1], [2, 3, 3]

    def shifted(**penalty):
        params = SamplingParams(temperature=1, **penalty)
        return np.log(probabilities(logits, params, prompt, output))

    def expected(values):
        return np.log(softmax(np.float64(values)))

    repeated = expected([1, -4, 1, -4, 2])
    np.testing.assert_allclose(shifted(repetition_penalty=2.0), repeated)
    present = expected([2, -2, 1.5, -2.5, 2])
    np.testing.assert_allclose(shifted(presence_penalty=0.5), present)
    frequent = expected([2, -2, 1.5, -3, 2])
    np.testing.assert_allclose(shifted(frequency_penalty=0.5), frequent)


def test_counts_kept_step_by_step_equal_counts_of_the_whole():
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={7: 1.5}
    )
    prompt, output, stepwise = [3, 4, 4], [], sampler(params, prompt_ids=[3, 4, 4])
    for position in range(30):
        logits = logits_of(seed=position, scale=0.5)
        token_id = token(stepwise, logits, 3 + position)
        assert token_id == probabilities(logits, params, prompt, output).argmax()
        stepwise.record(token_id)
        output.append(token_id)


def test_bias_forces_and_bans():
    logits = np.float32([1, 2, 3])
    assert token(sampler(SamplingParams(logit_bias={0: 100}), vocab_size=3), logits) == 0
    assert token(sampler(SamplingParams(logit_bias={2: -100}), vocab_size=3), logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_end_tokens_are_masked_until_min_tokens(temperature):
    params = SamplingParams(min_tokens=2, temperature=temperature)
    chooser = sampler(params, vocab_size=4, end_ids={2, 3})
    logits = np.float32([0, 1, 9, 8])
    for position, expected in enumerate([1, 1, 2, 2], start=5):
        assert token(chooser, logits, position) == expected
        chooser.record(expected)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1, repetition_penalty=1.1)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_raise_and_name_the_request(params, value):
    logits = logits_of()
    logits[17] = value
    with pytest.raises(RuntimeError, match=r"request 'r1': no token to choose at position 9.*17"):
        token(sampler(params), logits, 9)


def test_masking_every_token_raises():
    chooser = sampler(SamplingParams(min_tokens=1), vocab_size=2, end_ids={0, 1})
    with pytest.raises(RuntimeError, match="no token to choose"):
        token(chooser, np.float32([1, 2]))


def test_the_caller_s_logits_do_not_change():
    logits = logits_of()
    before = logits.copy()
    params = SamplingParams(temperature=0.5, top_p=0.5, min_p=0.1, logit_bias={1: 3}, min_tokens=4)
    token(sampler(params, end_ids={2}), logits)
    assert np.array_equal(logits, before)


def test_a_draw_is_a_function_of_seed_sample_and_position():
    keys = list(itertools.product((0, 1, 2**64 - 1), (0, 1, 63), (0, 1, 99_999)))
    draws = [uniform(*key) for key in keys]
    assert draws == [uniform(*key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert all(0 <= u < 1 for u in draws)
    for key in keys:
        assert uniform(*key) == (philox4x64_10(*key) >> 11) / 2**53


def philox4x64_10(seed, index, position):
    """The first word of the paper's generator; NumPy counts up before it draws."""
    counter, key = [position + 1, 0, 0, 0], [seed, index]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter[0]


def test_draw_inverts_the_cumulative_distribution():
    ids, probs = np.array([4, 7, 9]), np.array([0.5, 0.25, 0.25])
    below_one = np.nextafter(1.0, 0.0)
    edges = [(0.0, 4), (0.4999, 4), (0.5, 7), (0.7499, 7), (0.75, 9), (below_one, 9)]
    assert [draw(ids, probs, u) for u, _ in edges] == [token_id for _, token_id in edges]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=12),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution(params):
    num_draws, logits = 10_000, logits_of(scale=1.0)
    chooser = sampler(params, seed=1234)
    choices = choose([chooser] * num_draws, logits[None], range(num_draws), [0] * num_draws)
    drawn = np.bincount([choice.token_id for choice in choices], minlength=50)
    expected = probabilities(logits, params) * num_draws
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    assert stats.chisquare(drawn[kept], expected[kept]).pvalue > 1e-3


def test_samples_and_seeds_are_independent():
    logits = np.zeros(50, np.float32)
    params = SamplingParams(temperature=1.0)

    def tokens(**key):
        chooser = sampler(params, **key)
        return [token(chooser, logits, position) for position in range(200)]

    runs = [tokens(seed=s, index=i) for s, i in itertools.product((0, 1, 2), (0, 1))]
    for a, b in itertools.combinations(runs, 2):
        assert np.mean(np.equal(a, b)) < 0.1  # 0.02 by chance


def test_logprobs_are_those_of_the_raw_logits():
    logits = logits_of(200)
    raw = np.log(softmax(logits))
    order = np.argsort(-raw, kind="stable")
    for token_id in (int(order[0]), int(order[2]), int(order[150])):
        found = token_logprobs(logits, token_id, 5)
        assert next(iter(found)) == token_id
        assert set(found) == {token_id, *order[:5].tolist()}
        for key, (logprob, rank) in found.items():
            assert logprob == pytest.approx(raw[key], abs=1e-9)
            assert order[rank - 1] == key


def test_logprobs_of_no_others_and_of_more_than_there_are():
    assert token_logprobs(np.zeros(3, np.float32), 1, 0) == {1: Logprob(-math.log(3), 2)}
    assert list(token_logprobs(np.zeros(3, np.float32), 1, 20)) == [1, 0, 2]


def test_prompt_logprobs_read_as_a_list():
    table, rows = PromptLogprobs(), np.stack([logits_of(seed=i) for i in range(3)])
    table.extend(rows[:2], (4, 5), 2)
    table.extend(rows[2:], (6,), 2)
    assert len(table) == 4
    assert table[0] is None
    assert table[1:] == [token_logprobs(r, t, 2) for r, t in zip(rows, (4, 5, 6), strict=True)]
    assert list(table)[-1] == table[-1]
