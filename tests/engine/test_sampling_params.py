"""Every field of SamplingParams is valid or refused with a typed error that names it."""

import itertools
import pickle

import numpy as np
import pytest

from codellama_rt.engine.sampling_params import SamplingParams

INTEGERS = {  # lowest, highest allowed; None: unbounded
    "n": (1, 64),
    "max_tokens": (0, None),
    "min_tokens": (0, None),
    "top_k": (-1, None),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
REALS = {
    "temperature": (0.0, None),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
OPTIONAL = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
WRONG = [
    "1",
    b"1",
    [1],
    (1,),
    {1: 1},
    {1},
    1j,
    object(),
    True,
    False,
    np.bool_(True),
    np.array([1, 2]),
]
NOT_FINITE = [float("nan"), float("inf"), float("-inf"), np.float32("nan"), 10**400, -(10**400)]


def build(name, value):
    extra = {"max_tokens": None} if name == "min_tokens" else {}
    return SamplingParams(**{**extra, name: value})


def integer_cases():
    for name, (low, high) in INTEGERS.items():
        allowed = [low, low + 1, np.int64(low), 10**30 if high is None else high]
        yield from ((name, value, None) for value in allowed)
        below = [low - 1, low - 2, -(2**31), -(2**63), -(10**30), np.int32(-7)]
        above = [] if high is None else [high + 1, 2**64, 10**30]
        yield from ((name, value, ValueError) for value in below + above)
        others = [*WRONG, 1.0, 1.5, 0.0, np.float32(1), float("nan"), float("inf"), -float("inf")]
        yield from ((name, value, TypeError) for value in others)
        yield name, None, None if name in OPTIONAL else TypeError


def real_cases():
    for name, (low, high) in REALS.items():
        top = 1e308 if high is None else high
        allowed = [low, top, min(1, top), np.float32(0.5), np.int64(1), 0.5, 1e-2 + low]
        yield from ((name, value, None) for value in allowed)
        below = [low - 1e-3, -3, -1e308, np.float64(low - 1)]
        above = [] if high is None else [high + 1e-3, high * 2, 1e308, 10**30]
        yield from ((name, value, ValueError) for value in below + above + NOT_FINITE)
        yield from ((name, value, TypeError) for value in [*WRONG, None])


def list_cases():
    for value in (1, 1.5, None, {"a": 1}, {"a"}, b"a", iter("a"), True):
        yield "stop", value, TypeError
    for value in ([1], ["a", None], ["a", b"b"], [["a"]]):
        yield "stop", value, TypeError
    for value in ("", ["a", ""], ["x"] * 17):
        yield "stop", value, ValueError
    for value in ("a", ["a"] * 16, ("a", "\n"), [], ()):
        yield "stop", value, None
    for value in (1, None, "1", b"1", {"1": 2}, [1.0], ["1"], [None], [True], [[1]]):
        yield "stop_token_ids", value, TypeError
    for value in ([-1], [2, -(10**30)], [2**31], [10**30]):
        yield "stop_token_ids", value, ValueError
    for value in ([], (), [0], [2, 3], (2,), {7}, np.array([1, 2]), range(3), [2**31 - 1]):
        yield "stop_token_ids", value, None
    for value in (1, "1", [1], [(1, 2.0)], {"1": 2.0}, {1.0: 2.0}, {True: 2.0}, {None: 1.0}):
        yield "logit_bias", value, TypeError
    for value in ({1: "2"}, {1: None}, {1: True}, {1: [2]}, {1: 1j}):
        yield "logit_bias", value, TypeError
    for number in (*NOT_FINITE, 100.1, -100.1, 1e308):
        yield "logit_bias", {1: number}, ValueError
    for value in ({-1: 1.0}, {2**31: 1.0}, {10**30: 0}):
        yield "logit_bias", value, ValueError
    for value in (None, {}, {0: 0}, {5: -100}, {5: 100.0}, {np.int64(3): np.float32(1.5)}):
        yield "logit_bias", value, None
    for value in (0, 1, None, "yes", 1.0, np.bool_(True), []):
        yield "ignore_eos", value, TypeError
    for value in (True, False):
        yield "ignore_eos", value, None
    yield from restriction_cases()


def restriction_cases():
    """What restricts the tokens, and what the text holds."""
    for name in ("include_stop_str_in_output", "skip_special_tokens"):
        for value in (0, 1, None, "yes", 1.0, np.bool_(True), []):
            yield name, value, TypeError
        for value in (True, False):
            yield name, value, None
    for value in (1, "1", b"1", {"1": 2}, [1.0], ["1"], [None], [True], [[1]]):
        yield "allowed_token_ids", value, TypeError
    for value in ([], (), [-1], [2, -(10**30)], [2**31]):
        yield "allowed_token_ids", value, ValueError
    for value in (None, [0], (2,), {7}, np.array([1, 2]), range(3)):
        yield "allowed_token_ids", value, None
    for value in (1, None, {"a": 1}, b"a", [1], ["a", None], [["a"]], True):
        yield "bad_words", value, TypeError
    for value in ("", ["a", ""], ["x"] * 257):
        yield "bad_words", value, ValueError
    for value in ("a", ["a"] * 256, (), []):
        yield "bad_words", value, None
    for value in (1, print, {"a": print}, "a", [1], [print, None], {print}):
        yield "logits_processors", value, TypeError
    for value in (None, (), [], [print], (print, len)):
        yield "logits_processors", value, None


def test_every_field_is_valid_or_refused_by_name():
    count = 0
    for name, value, error in itertools.chain(integer_cases(), real_cases(), list_cases()):
        count += 1
        if error is None:
            build(name, value)
            continue
        with pytest.raises(error, match=rf"SamplingParams: {name}"):
            build(name, value)
    assert count >= 500


def test_pairs_of_extremes_are_valid_together():
    extremes = {
        **{name: (low, 10**30 if high is None else high) for name, (low, high) in INTEGERS.items()},
        **{name: (low, 1e308 if high is None else high) for name, (low, high) in REALS.items()},
        "max_tokens": (10**30, None),
    }
    for (a, values_a), (b, values_b) in itertools.combinations(extremes.items(), 2):
        for value_a, value_b in itertools.product(values_a, values_b):
            SamplingParams(**{"max_tokens": None, a: value_a, b: value_b})


def test_min_tokens_may_not_exceed_max_tokens():
    with pytest.raises(ValueError, match=r"min_tokens must be <= max_tokens \(4\), got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_values_are_normalised():
    params = SamplingParams(
        n=np.int32(2), temperature=1, stop="end", stop_token_ids=[3, 4], logit_bias={np.int64(1): 2}
    )
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {1: 2.0}


def test_default_is_greedy_and_a_value():
    params = SamplingParams()
    assert params.is_greedy
    assert not params.counts_tokens
    assert params == SamplingParams()
    assert hash(SamplingParams(logit_bias={1: 1})) == hash(params)  # equal otherwise
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(AttributeError):
        params.n = 2


def test_a_message_stays_short():
    with pytest.raises(ValueError, match="n must be >= 1 and <= 64") as raised:
        SamplingParams(n=10**1000)
    assert len(str(raised.value)) < 200
