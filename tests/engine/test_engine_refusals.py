"""What the engine refuses, before anything changes."""

import numpy as np
import pytest
from helpers.paged_fakes import PROMPT, engine_of, generate, greedy_tokens

from codellama_rt.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "at least one token"),
        ([1, 64], ValueError, r"prompt_token_ids\[1\] must be a token id in \[0, 64\), got 64"),
        ([1, 2, -1], ValueError, r"prompt_token_ids\[2\] .* got -1"),
        ([10**30], ValueError, r"prompt_token_ids\[0\] "),
        ([1, 2.0], TypeError, r"prompt_token_ids\[1\] must be an int, got float"),
        ([1, True], TypeError, r"prompt_token_ids\[1\] must be an int, got bool"),
        (["1"], TypeError, r"prompt_token_ids\[0\] must be an int, got str"),
        (np.zeros((1, 3), np.int64), TypeError, r"prompt_token_ids\[0\] must be an int, got list"),
        (np.zeros(3, np.float32), TypeError, r"prompt_token_ids\[0\] must be an int, got float"),
        ("text", TypeError, "encode text first"),
        (None, TypeError, "must be a list of int, got NoneType"),
        ([3] * 256, ValueError, "256 tokens does not fit max_model_len=256 .* at most 255"),
        ([3] * 200, ValueError, r"200 tokens .* 40 blocks of 4 tokens hold 160.*raise kv_memory"),
    ],
)
def test_a_bad_prompt_is_refused(prompt, error, message):
    engine = engine_of(num_blocks=40)
    with pytest.raises(error, match=message):
        engine.add_request("r", prompt)
    assert not engine.has_unfinished()
    assert engine.stats()["waiting"] == 0
    engine.add_request("r", PROMPT)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"n": 1}, TypeError, "params must be SamplingParams, got dict"),
        (
            SamplingParams(stop_token_ids=[1, 64]),
            ValueError,
            r"stop_token_ids\[1\] must be a token",
        ),
        (SamplingParams(logit_bias={99: 1}), ValueError, r"logit_bias\[99\] must be a token id"),
        (SamplingParams(stop="x"), ValueError, "stop strings need a tokenizer"),
    ],
)
def test_bad_params_are_refused(params, error, message):
    engine = engine_of(tokenizer=False)
    with pytest.raises(error, match=message):
        engine.add_request("r", PROMPT, params)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("name", [1, None, "", b"r"])
def test_a_bad_request_id_is_refused(name):
    with pytest.raises(TypeError, match="request_id must be a non-empty str"):
        engine_of().add_request(name, PROMPT)


def test_a_request_id_is_free_again_after_its_request():
    engine = engine_of()
    engine.add_request("r", PROMPT)
    with pytest.raises(ValueError, match="request_id 'r' is in use"):
        engine.add_request("r", PROMPT)
    engine.abort("r")
    engine.add_request("r", PROMPT)


@pytest.mark.parametrize("priority", [1.0, "high", None, True])
def test_a_bad_priority_is_refused(priority):
    with pytest.raises(TypeError, match="priority must be an int"):
        engine_of().add_request("r", PROMPT, priority=priority)


def test_a_model_length_without_room_is_refused():
    with pytest.raises(ValueError, match="max_model_len must be >= 2"):
        engine_of(max_model_len=1)


def test_prompts_may_be_arrays():
    expected = greedy_tokens()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = (np.array(PROMPT), np.array(PROMPT, np.uint16), list(np.array(PROMPT)), tuple(PROMPT))
    for prompt in prompts:
        assert generate(prompt, params).token_ids == expected
