"""generation_config.json: whatever it holds, a refusal names it, and comes when it is opened."""

import json

import pytest
from helpers.checkpoint_files import write_mini

import codellama_rt as clrt
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats import generation_config
from codellama_rt.errors import CheckpointError

COUNTS, NUMBERS, FLAGS = (
    generation_config._COUNTS,
    generation_config._NUMBERS,
    generation_config._FLAGS,
)
NO_NUMBERS = ["1", "", [], [1], {}, {"a": 1}, True]
BAD = {key: [*NO_NUMBERS, low - 1, 1.5, 10**30] for key, low in COUNTS.items()}
BAD |= {
    key: [*NO_NUMBERS, float("nan"), float("inf"), 10**400]
    + [bound for bound in (low - 1.0, high + 1.0) if bound - bound == 0.0]
    for key, (low, high) in NUMBERS.items()
}
BAD |= {key: ["yes", 0, 1, [], {}] for key in FLAGS}
BAD |= {
    "early_stopping": ["always", 2, [], {}],
    "suppress_tokens": ["x", 1, {}, [-1], ["a"], [1.5], [None], [[1]], [2**31]],
    "bad_words_ids": ["x", 1, {}, [1], [[]], [[-1]], [["a"]], [[1.5]], [[None]]],
    "stop_strings": [1, {}, [1], [None], [["a"]]],
    "eos_token_id": ["2", 1.5, True, {}, [None], [[2]], ["2"]],
    "bos_token_id": ["2", 1.5, True, {}, [None], [[2]], ["2"]],
    "pad_token_id": ["2", 1.5, True, {}, [None], [[2]], ["2"]],
}
GOOD = {
    "temperature": [0, 0.0, 0.7, 2, None],
    "top_p": [1, 0.9, None],
    "top_k": [50, 0, -1, None],
    "repetition_penalty": [1, 1.1, None],
    "length_penalty": [-1.0, 0.0, 2],
    "max_new_tokens": [1, 4096, None],
    "max_length": [20, 4096, None],
    "do_sample": [True, False, None],
    "early_stopping": [True, False, "never", None],
    "stop_strings": ["a", ["a", "b"], [], None],
    "suppress_tokens": [[], [1, 2], None],
    "bad_words_ids": [[], [[1], [2, 3]], None],
    "eos_token_id": [None, [], 2, [2, 3]],
    "pad_token_id": [None, 0],
    "transformers_version": ["4.57.6"],
    "_from_model_config": [True],
    "an unknown key": [{"a": [1]}],
}


def write(folder, **values):
    write_mini(folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("key", BAD)
def test_bad_values_name_file_and_key(tmp_path, key):
    for value in BAD[key]:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(write(tmp_path, **{key: value}))
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'generation_config.json'}: {key}: expected "), value
        assert len(message) < 500


@pytest.mark.parametrize("key", GOOD)
def test_good_values_open(tmp_path, key):
    for value in GOOD[key]:
        folder = write(tmp_path, **{key: value, "do_sample": key != "do_sample" or value})
        assert open_checkpoint(folder).generation_config[key] == value
        with clrt.LLM(folder, kv_memory=2**16) as llm:
            llm.default_params()
            clrt.LlamaForCausalLM(llm)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "2 beams cannot give num_return_sequences=3"),
        ({"num_return_sequences": 2}, "greedy search has one result"),
        ({"do_sample": True, "top_p": 0}, "top_p must be > 0"),
    ],
)
def test_values_that_contradict_one_another(tmp_path, values, words):
    folder = write(tmp_path, **values)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{words}"):
        clrt.LlamaForCausalLM.from_pretrained(folder, kv_memory=2**16)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{words}"):
        clrt.GenerationConfig.from_pretrained(folder)


def test_what_an_llm_samples_with_is_checked_when_it_is_opened(tmp_path):
    folder = write(tmp_path, do_sample=True, top_p=0)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: .*top_p must be > 0"):
        clrt.LLM(folder, kv_memory=2**16)
