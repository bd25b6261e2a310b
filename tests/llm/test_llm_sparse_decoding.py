"""LLM(sparse_decoding=...): prompts are exact, outputs do not depend on what is cached."""

import numpy as np
import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.model import sparse_attention

PROMPT = list(np.random.default_rng(5).integers(3, 250, 230))
PARAMS = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(sparse_attention, "DENSE_LAYERS", 1)
    monkeypatch.setattr(sparse_attention, "_LEAST_TOKENS", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


def opened(folder, fraction=0.25, **options):
    return LLM(folder, kv_memory=KV_MEMORY, block_size=16, sparse_decoding=fraction, **options)


def completed(llm, prompt):
    [one] = llm.generate([prompt], PARAMS)
    return one.token_ids, one.logprobs


def test_the_first_token_is_exact_and_later_ones_are_not(folder):
    with opened(folder) as sparse, opened(folder, None) as dense:
        (_, found), (_, expected) = (completed(llm, PROMPT) for llm in (sparse, dense))
    assert found[0] == expected[0]
    assert found != expected


def test_an_output_becomes_a_prompt_that_is_computed_anew(folder):
    with opened(folder) as llm:
        longer = PROMPT + completed(llm, PROMPT)[0] + [7, 8, 9]
        stats = llm.engine.stats()
        after_another = completed(llm, longer)
        found = llm.engine.stats()["prefix_hit_tokens"] - stats["prefix_hit_tokens"]
        assert found == len(PROMPT)  # and nothing that was generated
    with opened(folder) as llm:
        assert completed(llm, longer) == after_another


def test_a_preempted_output_does_not_take_the_blocks_of_an_equal_prompt(folder):
    with opened(folder) as llm:
        expected = completed(llm, PROMPT)
    with opened(folder) as llm:
        engine, token_ids = llm.engine, []

        def step():
            token_ids.extend(
                i for one in engine.step() if one.request_id == "a" for i in one.token_ids
            )

        engine.add_request("a", PROMPT, PARAMS)
        while len(token_ids) < 40:
            step()
        engine.add_request("b", PROMPT + token_ids, SamplingParams(max_tokens=1))
        while "b" in engine.table.requests:  # what "a" has written, computed as a prompt
            step()
        [sequence] = engine.scheduler.running
        engine.scheduler.preempt(sequence)
        while engine.has_unfinished():
            step()
        assert engine.stats()["preemptions"] == 1
    assert token_ids == expected[0]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fraction": 0}, ValueError, "above 0 and below 1, got 0"),
        ({"fraction": 1.0}, ValueError, "got 1.0; None attends all"),
        ({"fraction": float("nan")}, ValueError, "got nan"),
        ({"fraction": "0.5"}, TypeError, "must be a number"),
        ({"fraction": True}, TypeError, "must be a number"),
        ({"runtime": "graph"}, ValueError, "needs device 'cpu' and runtime 'direct'"),
    ],
)
def test_what_it_refuses(folder, options, kind, message):
    with pytest.raises(kind, match=message):
        opened(folder, **options)
