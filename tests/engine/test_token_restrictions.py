"""allowed_token_ids, bad_words, logits_processors, and what the text of an output holds."""

import numpy as np
import pytest
from helpers.faults import Faults
from helpers.paged_fakes import (
    PROMPT,
    FakeTokenizer,
    drain,
    drain_interrupted,
    engine_of,
    greedy_tokens,
    piece,
)

from codellama_rt.engine.sampler import ForbiddenTokens
from codellama_rt.engine.sampling_params import SamplingParams


class Speller(FakeTokenizer):
    """Words are spelled letter by letter: "c" is token 2; token 9 is a control token."""

    def __init__(self):
        self.names = {9: "<ctrl>"}

    def encode_continuation(self, text):
        return [ord(letter) % 64 for letter in text]

    def detokenizer(self, prompt_ids, *, skip_special_tokens):
        return _Spelling({} if skip_special_tokens else self.names)


class _Spelling:
    def __init__(self, names):
        self.names = names

    def push(self, token_id):
        return self.names.get(token_id, "" if token_id == 9 else piece(token_id))

    def flush(self):
        return ""


def result(params, engine=None):
    engine = engine or engine_of()
    engine.add_request("r", PROMPT, params)
    return drain(engine)["r", 0]


def plain(**options):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **options})


def test_only_allowed_tokens_come():
    total = result(plain(allowed_token_ids=[5, 6]))
    assert set(total.token_ids) <= {5, 6}
    drawn = result(plain(allowed_token_ids=[5, 6, 7], temperature=2.0, seed=1))
    assert set(drawn.token_ids) == {5, 6, 7}
    free = greedy_tokens()
    assert result(plain(allowed_token_ids=sorted(set(free)))).token_ids == free


def never(forbidden, vocab_size):
    """The tokens that may not come at all."""
    if forbidden.allowed is None:
        return []
    bits = np.unpackbits(forbidden.allowed.view(np.uint8), bitorder="little")[:vocab_size]
    return np.flatnonzero(bits == 0).tolist()


def test_runs_are_forbidden_by_their_last_token():
    forbidden = ForbiddenTokens(5, runs=[[0], [1, 2], [3, 1, 4]])
    seen = []
    for token_id in (1, 3, 1, 2):
        seen.append(forbidden.token_ids())
        forbidden.add(token_id)
    assert seen == [[], [2], [], [2, 4]]
    assert never(forbidden, 5) == [0]


def test_runs_are_those_of_the_whole_output():
    random = np.random.default_rng(1)
    for _ in range(200):
        runs = [random.integers(0, 4, random.integers(1, 5)).tolist() for _ in range(4)]
        output, forbidden = [], ForbiddenTokens(4, runs=runs)
        for token_id in random.integers(0, 4, 12).tolist():
            expected = {
                last for *begin, last in runs if output[len(output) - len(begin) :] == begin
            }
            assert {*never(forbidden, 4), *forbidden.token_ids()} == expected
            output.append(token_id)
            forbidden.add(token_id)


def test_allowed_tokens_and_runs_together():
    forbidden = ForbiddenTokens(4, allowed_ids=[1, 2], runs=[[2]])
    assert never(forbidden, 4) == [0, 2, 3]


def test_bad_words_never_come():
    free = greedy_tokens()
    word = "".join(chr(64 + token_id) for token_id in free[3:5])
    engine = engine_of(tokenizer=Speller())
    total = result(plain(bad_words=word), engine)
    assert total.token_ids[:4] == free[:4]
    assert total.token_ids[4] != free[4]
    single = result(plain(bad_words=[chr(64 + free[0])]), engine)
    assert free[0] not in single.token_ids


def test_bad_words_beyond_the_vocabulary_change_nothing():
    engine = engine_of(tokenizer=Speller())
    engine.tokenizer.encode_continuation = lambda text: [10**6]
    assert result(plain(bad_words=["x"]), engine).token_ids == greedy_tokens()


def test_processors_get_the_output_and_logits_that_they_may_change():
    seen = []

    def forced(token_ids, logits):
        seen.append(list(token_ids))
        token_ids.append(99)  # a list of its own
        logits[:] = -1.0
        logits[10 + len(seen)] = 1.0
        return logits

    total = result(plain(max_tokens=3, logits_processors=[forced], logprobs=0))
    assert total.token_ids == [11, 12, 13]
    assert seen == [[], [11], [11, 12]]
    untouched = result(plain(max_tokens=1, logprobs=20, logit_bias={11: 100}))
    assert total.logprobs[0][11].logprob == untouched.logprobs[0][11].logprob


def test_processors_run_one_after_another_and_nothing_allows_what_is_forbidden():
    def only(token_id):
        def processor(token_ids, logits):
            kept = np.full_like(logits, -np.inf)
            kept[token_id] = logits[token_id]
            return kept

        return processor

    failed = result(plain(logits_processors=[only(7), only(8)]))
    assert "no token to choose" in str(failed.error)
    failed = result(plain(logits_processors=[only(7)], allowed_token_ids=[8]))
    assert "allowed_token_ids" in str(failed.error)
    assert result(plain(max_tokens=2, logits_processors=[only(7)])).token_ids == [7, 7]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda ids, logits: 1 // 0, ZeroDivisionError, "division"),
        (lambda ids, logits: None, TypeError, "must return numbers, got object"),
        (lambda ids, logits: logits[:3], ValueError, "must return logits of shape"),
        (lambda ids, logits: logits * np.nan, RuntimeError, "no token to choose"),
        (lambda ids, logits: logits - np.inf, RuntimeError, "no token to choose"),
        (lambda: None, TypeError, "takes 0 positional arguments"),
    ],
)
def test_a_processor_that_fails_ends_its_request_alone(answer, error, words):
    engine = engine_of()
    engine.add_request("good", PROMPT, plain())
    engine.add_request("bad", PROMPT, plain(n=2, logits_processors=[answer]))
    gained = drain(engine)
    assert gained["good", 0].token_ids == greedy_tokens()
    for index in (0, 1):
        assert gained["bad", index].end == ("error", None)
    with pytest.raises(error, match=words):
        raise gained["bad", 0].error
    assert engine.scheduler.blocks.num_free == 64


def test_a_processor_that_fails_later_keeps_what_came_before():
    def failing(token_ids, logits):
        if len(token_ids) == 3:
            raise LookupError("three")
        return logits

    total = result(plain(logits_processors=[failing]))
    assert (total.token_ids, total.end) == (greedy_tokens()[:3], ("error", None))


def test_steps_that_raise_anywhere_can_be_repeated():
    """What the tokens restrict is made again from the tokens."""

    def no_repeats(token_ids, logits):
        logits[token_ids] = -np.inf
        return logits

    def run(faults=None, step=None):
        engine = engine_of(max_num_batched_tokens=8, tokenizer=Speller())
        for i, options in enumerate(
            [{"logits_processors": [no_repeats]}, {"bad_words": ["CD", "AAA", "?"], "n": 2},
             {"allowed_token_ids": [3, 9, 11], "skip_special_tokens": False, "temperature": 1.0,
              "seed": 2, "stop": ["ab"], "include_stop_str_in_output": True}]
        ):  # fmt: skip
            engine.add_request(str(i), PROMPT, plain(**options))
        return drain_interrupted(engine, faults, step)

    expected = run()
    for at in range(0, 400, 37):
        assert run(Faults(at, KeyboardInterrupt), step=5) == expected


@pytest.mark.parametrize("start", range(4))
def test_the_stop_string_may_stay(start):
    text = "".join(map(piece, greedy_tokens()))
    stop = text[start : start + 3]
    total = result(plain(stop=[stop], include_stop_str_in_output=True))
    assert total.text == text[: text.index(stop) + 3]
    assert total.end == ("stop", stop)


def test_the_text_of_a_stop_token_may_stay():
    free = greedy_tokens()
    cut = result(plain(stop_token_ids=[free[4]]))
    kept = result(plain(stop_token_ids=[free[4]], include_stop_str_in_output=True))
    assert kept.token_ids == cut.token_ids
    assert kept.text == cut.text + piece(free[4])


def test_control_tokens_may_be_shown():
    for skips, text in [(True, ""), (False, "<ctrl>" * 2)]:
        engine = engine_of(tokenizer=Speller())
        options = {"allowed_token_ids": [9], "skip_special_tokens": skips, "max_tokens": 2}
        assert result(plain(**options), engine).text == text


def test_what_the_engine_refuses():
    engine = engine_of()
    with pytest.raises(ValueError, match=r"allowed_token_ids\[1\] must be a token id"):
        engine.add_request("r", PROMPT, plain(allowed_token_ids=[1, 10**6]))
    engine = engine_of(tokenizer=False)
    with pytest.raises(ValueError, match="bad_words need a tokenizer"):
        engine.add_request("r", PROMPT, plain(bad_words=["x"]))
    assert not engine.has_unfinished()
