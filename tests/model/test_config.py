import json
import math

import pytest
from helpers.checkpoint_files import MINI_CONFIG, TINY, TINY_NAMES

from codellama_rt.errors import CheckpointError, CheckpointWarning
from codellama_rt.model.config import (
    ATTENTION_BIASES,
    MLP_BIASES,
    ModelConfig,
    RopeScaling,
    longrope_attention_factor,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 8.0],
}


def parse(**changes):
    values = {k: v for k, v in (MINI_CONFIG | changes).items() if v is not ...}
    return ModelConfig.from_hf(values)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_checkpoints(name):
    values = json.loads((TINY / name / "config.json").read_text())
    config = ModelConfig.from_hf(values)
    assert config.n_layers == values["num_hidden_layers"]
    assert config.head_dim == values["head_dim"]
    assert config.dtype == values["dtype"]
    assert config.tie_word_embeddings == (name == "tied_fp32")
    assert (config.rope_scaling is not None) == name.startswith("rope_")


def test_code_llama_7b():
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32016,
        }
    )
    assert config == ModelConfig(
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        dim=4096,
        hidden_dim=11008,
        vocab_size=32016,
        rope_theta=1e6,
        dtype="bfloat16",
    )


def test_absent_keys_take_the_defaults_of_transformers():
    absent = dict.fromkeys(
        ["num_key_value_heads", "rope_theta", "max_position_embeddings", "torch_dtype"], ...
    )
    config = parse(**absent)
    assert config.n_kv_heads == config.n_heads
    assert (config.rope_theta, config.max_position_embeddings) == (10000.0, 2048)
    assert (config.norm_eps, config.dtype) == (1e-6, "float32")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_head_dim_may_differ_from_the_implied_one():
    assert parse().head_dim == 4
    assert parse(head_dim=16).head_dim == 16


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([2, 9, 2], (2, 9)), (None, ()), ([], ())]
)
def test_eos_is_one_or_several(value, expected):
    assert parse(eos_token_id=value).eos_token_ids == expected


def test_bos_may_be_null():
    assert parse(bos_token_id=None).bos_token_id is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16"])
def test_dtype_names(key, value):
    assert parse(**{"torch_dtype": ..., key: value}).dtype == "float16"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0)),
        ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
            RopeScaling("dynamic", 2.0),
        ),
        ({"rope_type": "yarn", "factor": 2.0}, RopeScaling("yarn", 2.0, 64)),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 0,
                "mscale": 0,
                "truncate": False,
            },
            RopeScaling("yarn", 2.0, 32, truncate=False),
        ),
        (LLAMA3, RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)),
    ],
)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_rope_scaling(scaling, expected, style):
    if style == "rope_parameters" and scaling is not None:
        config = parse(rope_theta=..., rope_parameters=scaling | {"rope_theta": 5e5})
        assert config.rope_theta == 5e5
    else:
        config = parse(**{style: scaling})
        assert config.rope_theta == 10000.0
    assert config.rope_scaling == expected


def test_rope_parameters_with_only_a_base():
    config = parse(rope_theta=..., rope_parameters={"rope_theta": 1e6})
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


SIZES = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
]
REQUIRED = [*SIZES[:4], "vocab_size"]
BAD_SIZES = [0, -1, 10**12, 2**70, 8.0, True, "8", [8], math.nan]
BAD_SCALINGS = [
    ("linear", "an object or null"),
    ([], "an object or null"),
    ({"rope_type": "su2", "factor": 2.0}, "rope_type: expected one of default, linear"),
    ({"type": "long", "factor": 2.0}, "type: expected one of default, linear"),
    ({"rope_type": "longrope", "factor": 2.0}, "short_factor: expected a list of 2 numbers"),
    (LONGROPE | {"factor": None}, "factor: expected a number, or attention_factor beside it"),
    (LONGROPE | {"factor": -1.0}, "factor: expected a finite number above 0"),
    (LONGROPE | {"attention_factor": math.inf}, "attention_factor: expected a finite number"),
    (LONGROPE | {"short_factor": [1.0]}, "short_factor: expected a list of 2 numbers"),
    (LONGROPE | {"short_factor": 1.0}, "short_factor: expected a list of 2 numbers"),
    (LONGROPE | {"long_factor": [1.0, "2"]}, "long_factor: expected a finite number above 0"),
    (LONGROPE | {"long_factor": [1.0, 0.0]}, "long_factor: expected a finite number above 0"),
    (LONGROPE | {"long_factor": [1.0, math.nan]}, "long_factor: expected a finite number above 0"),
    (LONGROPE | {"long_factor": [1.0, True]}, "long_factor: expected a finite number above 0"),
    ({"factor": 2.0}, "rope_type"),
    ({"rope_type": ["linear"], "factor": 2.0}, "rope_type"),
    ({"rope_type": "linear"}, "factor: expected a finite number above 0, found 'nothing'"),
    ({"rope_type": "linear", "factor": 0}, "factor"),
    ({"rope_type": "linear", "factor": -2.0}, "factor"),
    ({"rope_type": "linear", "factor": math.inf}, "factor"),
    ({"rope_type": "linear", "factor": 10**400}, "factor"),
    ({"rope_type": "linear", "factor": "2"}, "factor"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast"),
    ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate: expected true or false"),
    (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -4},
        "original_max_position_embeddings",
    ),
    (LLAMA3 | {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
    (LLAMA3 | {"low_freq_factor": None}, "low_freq_factor"),
    (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor: expected a number above"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_type": "default", "rope_theta": 5.0}, "rope_theta: expected the same as rope_theta"),
]
BAD_CONFIGS = [
    *[({key: value}, f"{key}: expected an integer") for key in SIZES for value in BAD_SIZES],
    *[({key: ...}, f"{key}: expected an integer .* found 'nothing'") for key in REQUIRED],
    *[({"rope_scaling": value}, message) for value, message in BAD_SCALINGS],
    ({"architectures": ["QwenForCausalLM"]}, "'QwenForCausalLM'.*only LlamaForCausalLM and Mis"),
    ({"architectures": ["MistralForCausalLM"]}, "model_type: expected 'mistral', found 'llama'"),
    ({"model_type": "mistral"}, "model_type: expected 'llama', found 'mistral'"),
    (MISTRAL | {"sliding_window": ...}, "sliding_window: expected null, found 'nothing'"),
    (MISTRAL | {"sliding_window": 4096}, "sliding_window: expected null, found 4096"),
    (MISTRAL | {"num_key_value_heads": None}, "num_key_value_heads: expected an integer"),
    (MISTRAL | {"max_position_embeddings": ...}, "max_position_embeddings: expected an integer"),
    ({"architectures": [], "model_type": ...}, "architectures: expected"),
    ({"architectures": "LlamaForCausalLM"}, "architectures: expected"),
    ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, "architectures: expected"),
    ({"architectures": ..., "model_type": ...}, "architectures: expected"),
    ({"architectures": ..., "model_type": "gpt2"}, "model_type: expected 'llama' or 'mistral', fo"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"attention_bias": "yes"}, "attention_bias: expected true or false"),
    ({"mlp_bias": 0}, "mlp_bias: expected true or false"),
    ({"original_max_position_embeddings": 0}, "original_max_position_embeddings: expected an int"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"num_attention_heads": 3}, "hidden_size: expected a multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "multiple of the number of key-value heads, found 2 and 3"),
    ({"head_dim": 5}, "expected an even head_dim"),
    ({"hidden_size": 2**18, "num_attention_heads": 2}, "at most 1024 for each of 2 heads"),
    ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim of at least 4"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rope_theta": 1.0}, "rope_theta: expected a finite number above 1"),
    ({"rope_theta": -1e6}, "rope_theta"),
    ({"rope_theta": True}, "rope_theta"),
    ({"torch_dtype": "int8"}, "torch_dtype: expected one of float32"),
    ({"dtype": 16}, "dtype: expected one of float32"),
    ({"eos_token_id": 2**64}, "eos_token_id: expected a token id"),
    ({"eos_token_id": 2.0}, "eos_token_id: expected a token id"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [2, None]}, "eos_token_id"),
    ({"bos_token_id": True}, "bos_token_id"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3},
        "nothing beside rope_parameters",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_bad_configs(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(**changes)
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize("none", [-1, 10, 32000, 2**31, 2**32 - 1, -(2**63), 2**64 - 1])
def test_ids_that_mean_none(none):
    """Llama 1 and 2 were published with a pad id of -1 and of 32000 among 32000 tokens."""
    with pytest.warns(CheckpointWarning, match=f"eos_token_id: {none} is none of the 10 tokens"):
        assert parse(eos_token_id=none).eos_token_ids == ()
    with pytest.warns(CheckpointWarning, match="eos_token_id"):
        assert parse(eos_token_id=[2, none, 7]).eos_token_ids == (2, 7)
    with pytest.warns(CheckpointWarning, match="bos_token_id"):
        assert parse(bos_token_id=none).bos_token_id is None


def test_old_names_of_the_architecture():
    with pytest.warns(CheckpointWarning, match="LLaMAForCausalLM.* is an old name"):
        assert parse(architectures=["LLaMAForCausalLM"]) == parse()
    assert parse(architectures=[]) == parse(architectures=None) == parse()


def test_float64_is_computed_with_as_float32():
    assert parse(torch_dtype="float64").dtype == "float32"


def test_mistrals_name_of_the_same_architecture():
    assert parse(**MISTRAL) == parse()
    assert parse(**MISTRAL | {"architectures": ...}) == parse()


@pytest.mark.parametrize(
    ("flags", "biased"),
    [
        ({}, ()),
        ({"attention_bias": True}, ATTENTION_BIASES),
        ({"mlp_bias": True}, MLP_BIASES),
        ({"attention_bias": True, "mlp_bias": True}, ATTENTION_BIASES + MLP_BIASES),
    ],
)
def test_biases(flags, biased):
    assert parse(**flags).biased == biased


def test_longrope():
    plain = parse(rope_scaling=LONGROPE).rope_scaling
    assert (plain.factor, plain.original_max_position_embeddings) == (4.0, 64)
    assert plain.attention_factor == math.sqrt(1 + math.log(4.0) / math.log(64))
    assert (plain.frequency_factors, plain.long_factors) == ((1.0, 1.5), (2.0, 8.0))
    old = {"type": "su"} | {k: v for k, v in LONGROPE.items() if k != "rope_type"}
    assert parse(rope_scaling=old).rope_scaling == plain
    # The original length beside the other keys goes before the factor, as in transformers 4.57.
    ratio = parse(rope_scaling=LONGROPE, original_max_position_embeddings=32).rope_scaling
    assert (ratio.factor, ratio.original_max_position_embeddings) == (2.0, 32)
    assert ratio.attention_factor == math.sqrt(1 + math.log(2.0) / math.log(32))
    given = parse(rope_scaling=LONGROPE | {"attention_factor": 1.25, "factor": None}).rope_scaling
    assert given.attention_factor == 1.25
    assert longrope_attention_factor(0.5, 64) == 1.0


@pytest.mark.parametrize(
    "value",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        LONGROPE,
    ],
)
def test_rope_given_at_load_is_that_of_a_file(value):
    at_load = parse().with_rope(1e6, value)
    assert at_load == parse(rope_theta=1e6, rope_scaling=value)
    assert at_load.with_rope(1e4, {"rope_type": "default"}) == parse(rope_theta=1e4)
    assert at_load.with_rope() == at_load
    inside = {"rope_theta": 1e6} | value
    assert parse(rope_theta=5.0).with_rope(None, inside) == parse(
        rope_theta=1e6, rope_scaling=value
    )


@pytest.mark.parametrize(
    ("theta", "scaling", "error", "words"),
    [
        (1.0, None, ValueError, "rope_theta: expected a finite number above 1"),
        ("1e6", None, ValueError, "rope_theta: expected a finite number above 1"),
        (True, None, ValueError, "rope_theta: expected a finite number above 1"),
        (None, "linear", TypeError, "rope_scaling must be a dict, got str"),
        (None, {"rope_type": "linear"}, ValueError, "rope_scaling: factor: expected"),
        (
            None,
            {"rope_type": "ntk"},
            ValueError,
            "rope_scaling: rope_type: expected one of default",
        ),
        (None, {"rope_theta": 0.5}, ValueError, "rope_scaling: rope_theta: expected a finite"),
    ],
)
def test_rope_that_cannot_be_given(theta, scaling, error, words):
    with pytest.raises(error, match=words):
        parse().with_rope(theta, scaling)


def test_which_prompts_are_rotated_alike():
    assert parse().rope_class(10**6) == 0
    dynamic = parse(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert [dynamic.rope_class(n) for n in (1, 64, 65, 80)] == [0, 0, 1, 16]
    longrope = parse(rope_scaling=LONGROPE, original_max_position_embeddings=32)
    assert [longrope.rope_class(n) for n in (1, 32, 33, 80)] == [0, 0, 1, 1]


def test_long_values_are_cut_in_messages():
    with pytest.raises(CheckpointError) as caught:
        parse(hidden_act="x" * 100_000)
    assert len(str(caught.value)) < 400
