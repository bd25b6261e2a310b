"""Adapters that are damaged, hostile, or ask for what is not supported, and the errors."""

import contextlib
import json
import time

import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.checkpoint_files import MINI_CONFIG

from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig

CONFIG = ModelConfig.from_hf(MINI_CONFIG)
DIM, VOCAB = CONFIG.dim, CONFIG.vocab_size
BASE = "base_model.model."
LAYER = f"{BASE}model.layers.0.self_attn.q_proj."
EMBEDDING = f"{BASE}model.embed_tokens."
BOMB = "(([a-z_.]+)*)*!"


def floats(*shape):
    return np.ones(shape, np.float32)


def loaded(folder, tensors=None, **values):
    write_adapter(folder, CONFIG, projections=("q_proj",), changes=tensors, **values)
    return load_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": start}
        for start in (True, False, None, "gaussian", "eva", "orthogonal")
    ]
    + [
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.5, "task_type": "SEQ_CLS", "megatron_core": "x", "peft_version": "9"},
        {"eva_config": {"rho": 2.0}, "loftq_config": {"a": 1}, "corda_config": {"b": 1}},
        {"auto_mapping": {"a": "b"}, "qalora_group_size": 32, "use_qalora": False},
        {"some_new_key": None, "another": False, "one_more": [], "yet_another": {}, "last": ""},
        {"layer_replication": None, "target_parameters": [], "alora_invocation_tokens": None},
        {"modules_to_save": ["score", "classifier"]},  # which a Llama for causal LM does not have
        {"bias": "all"}, {"bias": "lora_only"},
        {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.layers\.\d+\..*_proj"}, {"target_modules": None},
        {"target_modules": ["self_attn.q_proj"], "exclude_modules": ["mlp.up_proj", "lm_head"]},
        {"layers_to_transform": 0, "target_modules": r".*q_proj"},
        {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers",
         "target_modules": ["q_proj"]},
        {"rank_pattern": {"up_proj": 16, BOMB: 3}}, {"rank_pattern": None, "alpha_pattern": None},
        {"r": 8, "rank_pattern": {".*q_proj": 4}},
    ],
)  # fmt: skip
def test_values_that_change_nothing(tmp_path, values):
    plain = loaded(tmp_path / "plain")
    found = loaded(tmp_path / "other", **values)
    for one, other in zip(plain.layers, found.layers, strict=True):
        assert np.array_equal(one["q_proj"].up, other["q_proj"].up)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *(
            ({"init_lora_weights": start}, "init_lora_weights: .*this start changes the base")
            for start in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", 3)
        ),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: .*aLoRA"),
        ({"use_qalora": True}, "use_qalora: .*QA-LoRA is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: .*merge the adapter"),
        ({"target_parameters": ["x.y"]}, "target_parameters: .*outside of linear"),
        ({"megatron_config": {"a": 1}}, "megatron_config: .*Megatron"),
        ({"arrow_config": {"a": 1}}, "arrow_config: .*routing"),
        ({"lora_ga_config": {"a": 1}}, "lora_ga_config: .*changes the base model"),
        ({"some_new_key": 1}, "some_new_key: .*found 1; it is unknown and may change the result"),
        ({"some_new_key": 0.0}, "some_new_key: .*unknown"),
        ({"peft_type": "ADALORA"}, "peft_type: expected 'LORA'"),
        ({"bias": ["all"]}, "bias: expected 'none', 'all' or 'lora_only'"),
        ({"use_dora": 1}, "use_dora: expected true or false"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias: .*not supported"),
        ({"use_dora": True}, "lora_magnitude_vector, found no lora_magnitude_vector"),
        ({"lora_bias": True}, r"lora_B\.bias, found no lora_B\.bias"),
        ({"r": 0}, "r: expected an integer from 1 to 4096"),
        ({"r": -4}, "r: expected an integer from 1"),
        ({"r": 10**9}, "r: expected an integer from 1"),
        ({"r": 4.0}, "r: expected an integer"),
        ({"r": 5}, "expected the rank of model.layers.0.self_attn.q_proj, 4, found 5"),
        ({"rank_pattern": {"q_proj": 3}}, "expected the rank of .*, 4, found 3"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected patterns with integers from 1"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern: expected patterns with integers"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: expected patterns with integers"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: expected patterns whose parentheses"),
        ({"rank_pattern": [4]}, "rank_pattern: expected an object"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": 1e300}, "expected a scale in the range of float32, found 1e.300"),
        ({"lora_alpha": 1e39, "scale": 1e3}, "scale times lora_B: expected finite values"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: .*finite numbers above 0"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: .*finite numbers above 0"),
        ({"alpha_pattern": {r"(q)\1": 1}}, "alpha_pattern: expected patterns without references"),
        ({"alpha_pattern": {"a" * 3000: 1}}, "alpha_pattern: expected patterns of at most"),
        ({"modules_to_save": ["lm_head"]}, "expected a weight of lm_head, which modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names"),
        ({"modules_to_save": [1]}, "modules_to_save: expected a list of names"),
        ({"target_modules": ["v_proj"]}, "target_modules: expected modules with model.layers.0"),
        ({"target_modules": r".*\.v_proj"}, "target_modules: .*PEFT would not apply them"),
        ({"target_modules": 3}, "target_modules: expected a list of names"),
        ({"target_modules": "(" * 50}, "target_modules: expected patterns"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules: .*PEFT would not apply them"),
        ({"exclude_modules": ".*q_proj"}, "exclude_modules: .*PEFT would not apply them"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "target_modules: .*PEFT"),
        ({"layers_to_transform": "all"}, "layers_to_transform: expected numbers of layers"),
        ({"layers_pattern": "h"}, "layers_pattern: expected a pattern of 'layers'"),
        ({"trainable_token_indices": [1]}, "expected trainable_tokens_delta of embed_tokens"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices: .*each once"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: expected a list"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "trainable_token_indices: .*embed_tokens"),
    ],
)  # fmt: skip
def test_values_that_are_refused(tmp_path, values, words):
    with pytest.raises(CheckpointError, match=words) as fault:
        loaded(tmp_path / "a", **values)
    assert "adapter_config.json" in str(fault.value) or "adapter_model" in str(fault.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_years_elsewhere(tmp_path, key):
    before = time.perf_counter()
    loaded(tmp_path / "a", **{key: {"(" * i + BOMB + ")" * i: 1 for i in range(10)}})
    loaded(tmp_path / "b", target_modules=f"{BOMB}|.*q_proj", exclude_modules=BOMB)
    with pytest.raises(CheckpointError, match="matched in fewer steps"):
        loaded(tmp_path / "c", **{key: {".*" * 900 + f"{i}": 1 for i in range(200)}})
    with pytest.raises(CheckpointError, match="matched in fewer steps"):
        loaded(tmp_path / "d", **{key: {f"{i}_proj": 1 for i in range(400_000)}})
    assert time.perf_counter() - before < 120


def test_a_plain_name_for_every_module_is_no_burden(tmp_path):
    """As EVA writes it: here 2000 names."""
    names = [f"model.layers.{i}.mlp.{side}_proj" for i in range(1000) for side in ("up", "down")]
    before = time.perf_counter()
    loaded(tmp_path / "a", rank_pattern=dict.fromkeys(names, 3), alpha_pattern={"a": 1, ".*": 9})
    assert time.perf_counter() - before < 30


@pytest.mark.parametrize(
    ("tensors", "values", "words"),
    [
        ({f"{LAYER}lora_A.weight": floats(0, DIM), f"{LAYER}lora_B.weight": floats(DIM, 0)}, {},
         "expected one rank from 1 to 4096, found 0|expected every axis|empty"),
        ({f"{LAYER}lora_A.weight": floats(5000, DIM), f"{LAYER}lora_B.weight": floats(DIM, 5000)},
         {}, "expected one rank from 1 to 4096, found 5000"),
        ({f"{LAYER}lora_A.weight": np.ones((), np.float32)[...]}, {}, "expected "),
        ({f"{LAYER}lora_A.weight": floats(4, DIM, 1)}, {}, "expected "),
        ({f"{LAYER}lora_A.default.weight": floats(4, DIM)}, {}, "expected one lora_A, found two"),
        ({f"{LAYER[len(BASE):]}lora_A.weight": floats(4, DIM)}, {}, "expected one lora_A, found"),
        ({f"{LAYER}lora_B.bias": floats(DIM)}, {}, r"found lora_B\.bias as well"),
        ({f"{LAYER}lora_B.bias": floats(DIM + 1)}, {"lora_bias": True}, r"lora_B.bias: expected"),
        ({f"{LAYER}lora_magnitude_vector": floats(DIM)}, {}, "found lora_magnitude_vector as well"),
        ({f"{LAYER}lora_magnitude_vector": floats(DIM)}, {"use_dora": True}, "DoRA needs"),
        ({f"{LAYER}lora_magnitude_vector": floats(DIM, 1)}, {"use_dora": True}, "expected .*found"),
        ({f"{LAYER}bias": floats(DIM)}, {"bias": "all"}, "expected no bias: the model has none"),
        ({f"{LAYER}base_layer.weight": floats(DIM, DIM + 1)}, {}, "weight: expected"),
        ({f"{LAYER}lora_C.weight": floats(4, DIM)}, {}, "expected float lora_A, lora_B or another"),
        ({f"{LAYER}lora_A.weight.weight.weight": floats(4, DIM)}, {}, "expected float lora_A"),
        ({"x" * 100_000: floats(4)}, {}, "expected float lora_A"),
        ({f"{BASE}score.weight": floats(2, DIM)}, {}, "score: expected a projection of the model"),
        ({f"{BASE}model.layers.00000000000.mlp.up_proj.lora_A.weight": floats(4, DIM)}, {},
         "expected a projection of the model"),
        ({f"{BASE}model.layers.0.lm_head.weight": floats(4, DIM)}, {}, "expected a projection"),
        ({f"{BASE}model.layers.0.mlp.q_proj.lora_A.weight": floats(4, DIM)}, {},
         "expected a projection of the model"),
        ({f"{BASE}model.norm.weight": floats(DIM + 1)}, {}, "norm.weight: expected"),
        ({f"{BASE}model.norm.weight": np.full(DIM, np.nan, np.float32)}, {}, "finite values"),
        ({f"{BASE}model.norm.lora_A.weight": floats(4, DIM)}, {}, "norm: expected a weight"),
        ({f"{EMBEDDING}weight": floats(VOCAB + 1, DIM)}, {}, "the vocabulary was resized"),
        ({f"{EMBEDDING}lora_embedding_A": floats(4, VOCAB)}, {}, "found no lora_embedding_B"),
        ({f"{EMBEDDING}lora_embedding_A": floats(4, VOCAB + 1),
          f"{EMBEDDING}lora_embedding_B": floats(DIM, 4)}, {}, "embedding_A: expected"),
        ({f"{EMBEDDING}lora_A.weight": floats(4, DIM)}, {}, "expected lora_embedding_A and"),
        ({f"{EMBEDDING}token_adapter.trainable_tokens_delta": floats(1, DIM)}, {},
         "expected trainable_token_indices of embed_tokens"),
        ({f"{EMBEDDING}token_adapter.trainable_tokens_delta": floats(1, DIM)},
         {"trainable_token_indices": [VOCAB]}, "with ids below"),
        ({f"{EMBEDDING}token_adapter.trainable_tokens_delta": floats(1, DIM)},
         {"trainable_token_indices": [1, 2]}, "trainable_tokens: expected"),
        ({f"{EMBEDDING}token_adapter.trainable_tokens_delta": floats(1, DIM),
          f"{EMBEDDING}weight": floats(VOCAB, DIM)}, {"trainable_token_indices": [1]},
         "tokens beside other changes of embedding"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path, tensors, values, words):
    with pytest.raises(CheckpointError, match=words) as fault:
        loaded(tmp_path / "a", tensors, **values)
    assert len(str(fault.value)) < 2000


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "null", '{"r": 1, "r": 1}', "[" * 10_000, '{"r": ' + "9" * 10_000 + "}", "\\xff"],
)
def test_configurations_that_are_no_json_objects(tmp_path, text):
    folder = write_adapter(tmp_path / "a", CONFIG)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(folder, CONFIG)


def test_random_values_in_every_key(tmp_path):
    """Whatever a value is: an adapter or a CheckpointError, and soon."""
    folder = write_adapter(tmp_path / "a", CONFIG, projections=("q_proj",))
    values = json.loads((folder / "adapter_config.json").read_text())
    keys = [*values, "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "lora_bias",
            "modules_to_save", "trainable_token_indices", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern", "init_lora_weights", "ensure_weight_tying",
            "alora_invocation_tokens", "megatron_config", "unknown"]  # fmt: skip
    hostile = [None, True, 0, -1, 10**30, 1e308, float("nan"), float("inf"), "", "x", "(", "\0", [],
               [[]], [None], [1], ["q_proj"], {}, {"a": 1}, {"": 4}, {"q_proj": None}, {"(": 1},
               {"a": {"b": [1]}}, "(" * 5000]  # fmt: skip
    for key in keys:
        for value in hostile:
            (folder / "adapter_config.json").write_text(json.dumps(values | {key: value}))
            with contextlib.suppress(CheckpointError):
                load_adapter(folder, CONFIG)
