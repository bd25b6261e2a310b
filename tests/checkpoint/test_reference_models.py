"""Models of one feature each: the logits are those of Transformers (data/reference/README.md)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.checkpoint_files import gguf_bytes, gguf_metadata, gguf_tensors
from helpers.oracle import forward

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.hf_writer import write_directory
from codellama_rt.checkpoint.open import resolve
from codellama_rt.checkpoint.tensor_names import named_weights
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory_plan import estimate
from codellama_rt.llm.placement import make_model, place
from codellama_rt.llm.plan import Plan
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.ops.quantized import Quantized
from codellama_rt.tools.convert.convert import convert

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
NAMES = sorted(path.name for path in REFERENCE.iterdir() if path.is_dir())
PACKED = [name for name in NAMES if name.startswith(("awq", "gptq"))]
BIASED = [name for name in NAMES if name.startswith("bias")]
TOLERANCE = 1e-5


def golden(name):
    with np.load(REFERENCE / name / "golden.npz") as arrays:
        return dict(arrays)


def prompts(name):
    arrays = golden(name)
    for i in range(len(arrays)):
        if f"prompt_{i}" in arrays:
            yield arrays[f"prompt_{i}"].tolist(), arrays[f"logits_{i}"]


def open_model(path, dtype="float32", **options):
    checkpoint = open_checkpoint(path, dtype=dtype, **options)
    return Llama(checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [512, 7])
def test_logits_are_those_of_transformers(name, chunk_size):
    model = open_model(REFERENCE / name, "float16" if name in PACKED else "float32")
    for prompt, logits in prompts(name):
        found = sequence_logits(model, prompt, chunk_size=chunk_size)
        assert np.abs(found - logits).max() < TOLERANCE


@pytest.mark.parametrize("name", ["longrope", "bias_all"])
def test_generation_is_greedy_over_those_logits(name):
    """longrope turns to its long factors on the way, at 32 tokens."""
    [prompt] = [ids for ids, _ in prompts(name) if len(ids) == 20]
    with LLM(REFERENCE / name, dtype="float32", kv_memory=2**20, max_model_len=64) as llm:
        found = llm.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0].token_ids
        weights, config = llm.model.weights, llm.config
    ids = [*prompt, *found]
    rows = range(len(prompt) - 1, len(ids) - 1)
    logits = forward(weights, config, ids, rows=rows, prompt_length=len(prompt))
    assert len(found) == 30
    for token, row in zip(found, logits, strict=True):
        assert row[token] > row.max() - 1e-4


# Biases


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_graph_adds_biases_with_the_same_bits(name, dtype):
    checkpoint = open_checkpoint(REFERENCE / name, dtype=dtype)
    cell = make_model("cpu", checkpoint.config, checkpoint.weights, runtime="graph")
    model = Llama(checkpoint.config, checkpoint.weights)
    for prompt, _ in prompts(name):
        assert (sequence_logits(cell, prompt) == sequence_logits(model, prompt)).all()


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_biases_stay_floats_beside_quantised_weights(name, quantization):
    weights = open_checkpoint(REFERENCE / name, quantization=quantization).weights
    plain = open_checkpoint(REFERENCE / name).weights
    for found, expected in zip(weights.biases, plain.biases, strict=True):
        assert found.keys() == expected.keys()
        assert all((found[field] == expected[field]).all() for field in found)
    assert isinstance(weights.layers[0].q_proj, Quantized)


@pytest.mark.parametrize("name", BIASED)
def test_biases_survive_every_conversion(tmp_path, name):
    folder = REFERENCE / name
    original = open_checkpoint(folder)
    write_directory(tmp_path / "saved", original.config, original.weights)
    convert(folder, tmp_path / "int8", quantization="int8")
    for made in ("saved", "int8"):
        again = open_checkpoint(tmp_path / made)
        assert again.config.biased == original.config.biased
        for found, expected in zip(again.weights.biases, original.weights.biases, strict=True):
            assert all((found[field] == expected[field]).all() for field in expected)
    with pytest.raises(ValueError, match=r"params\.json does not support .*biases"):
        convert(folder, tmp_path / "meta", to="meta")


@pytest.mark.parametrize("name", BIASED)
def test_biases_in_gguf_files(tmp_path, name):
    """llama.cpp's converter puts the rows of the biases of q and k in order as the weights'."""
    original = open_checkpoint(REFERENCE / name, dtype="float32")
    named = named_weights(original.config, original.weights)
    file = tmp_path / "a.gguf"
    tensors = gguf_tensors(named, original.config)
    file.write_bytes(gguf_bytes(gguf_metadata(original.config), tensors))
    found = open_checkpoint(file, dtype="float32")
    assert found.config.biased == original.config.biased
    for prompt, logits in prompts(name):
        model = Llama(found.config, found.weights)
        assert np.abs(sequence_logits(model, prompt) - logits).max() < TOLERANCE
    convert(file, tmp_path / "hf", dtype="float32")
    again = open_checkpoint(tmp_path / "hf")
    for mine, theirs in zip(again.weights.biases, original.weights.biases, strict=True):
        assert all((mine[field] == theirs[field]).all() for field in theirs)


def test_biases_of_some_projections_alone(tmp_path):
    """A GGUF file may have those of q, k and v only; config.json has no word for it."""
    original = open_checkpoint(REFERENCE / "bias_attention", dtype="float32")
    named = named_weights(original.config, original.weights)
    tensors = {
        name: tensor
        for name, tensor in gguf_tensors(named, original.config).items()
        if not name.endswith("attn_output.bias")
    }
    file = tmp_path / "a.gguf"
    file.write_bytes(gguf_bytes(gguf_metadata(original.config), tensors))
    found = open_checkpoint(file)
    assert found.config.biased == ("q_proj", "k_proj", "v_proj")
    with pytest.raises(
        ValueError, match=r"config\.json cannot express biases of q_proj, k_proj, v"
    ):
        write_directory(tmp_path / "saved", found.config, found.weights)


@pytest.mark.parametrize("device", ["cuda", "ascend"])
def test_other_devices_have_no_biases(device):
    checkpoint = open_checkpoint(REFERENCE / "bias_attention")
    with pytest.raises(ValueError, match=r"projections with biases .* on device 'cpu' only"):
        place(Plan(device=device), checkpoint.config, checkpoint.weights)


# RoPE given at load


def test_rope_given_at_load(tmp_path):
    """The model without its scaling, with the scaling given, is the model with it."""
    folder = shutil.copytree(REFERENCE / "longrope", tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 5e5}))
    options = {"kv_memory": 2**20, "dtype": "float32", "max_model_len": 128}
    with LLM(folder, rope_theta=theta, rope_scaling=scaling, **options) as llm:
        for prompt, logits in prompts("longrope"):
            assert np.abs(llm.logits(prompt) - logits).max() < TOLERANCE
    with LLM(folder, **options) as llm:
        *_, (prompt, logits) = prompts("longrope")
        assert np.abs(llm.logits(prompt) - logits).max() > 0.01


def longrope_gguf(file, changes=None, metadata=None):
    original = open_checkpoint(REFERENCE / "longrope_ratio", dtype="float32")
    tensors = gguf_tensors(named_weights(original.config, original.weights), original.config)
    scaling = original.config.rope_scaling
    for name, factors in (("short", scaling.frequency_factors), ("long", scaling.long_factors)):
        raw = np.array(factors, np.float32).tobytes()
        tensors[f"rope_factors_{name}.weight"] = ("F32", (len(factors),), raw)
    tensors |= changes or {}
    keys = {
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.attn_factor": float(scaling.attention_factor),
    } | (metadata or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    file.write_bytes(gguf_bytes(gguf_metadata(original.config) | keys, tensors))
    return file


def test_longrope_in_a_gguf_file(tmp_path):
    file = longrope_gguf(tmp_path / "a.gguf")
    model = open_model(file)
    for prompt, logits in prompts("longrope_ratio"):
        assert np.abs(sequence_logits(model, prompt) - logits).max() < TOLERANCE


BAD_FACTORS = [
    (
        {"rope_factors_short.weight": None},
        {},
        r"rope_factors_short.weight': expected it for longrope",
    ),
    (
        {"rope_factors_long.weight": None},
        {},
        r"rope_factors_long.weight': expected it for longrope",
    ),
    ({"rope_factors_long.weight": ("F32", (4,), bytes(16))}, {}, r"expected F32 \(8,\), found F32"),
    ({"rope_factors_long.weight": ("F32", (8,), bytes(32))}, {}, "finite factors above 0"),
    ({}, {"llama.rope.scaling.attn_factor": -1.0}, "attn_factor: expected a finite number above"),
    ({}, {"llama.rope.scaling.original_context_length": 0}, "original_context_length: expected"),
]


@pytest.mark.parametrize(("changes", "metadata", "message"), BAD_FACTORS)
def test_bad_longrope_in_a_gguf_file(tmp_path, changes, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(longrope_gguf(tmp_path / "a.gguf", changes, metadata))


def test_longrope_is_saved(tmp_path):
    original = open_checkpoint(REFERENCE / "longrope_ratio")
    write_directory(tmp_path, original.config, original.weights)
    again = open_checkpoint(tmp_path).config
    assert (again.rope_scaling, again.rope_theta) == (
        original.config.rope_scaling,
        original.config.rope_theta,
    )


def test_prompts_that_are_rotated_differently_share_no_blocks():
    """Up to 32 tokens the short factors, beyond them the long ones: for the whole prompt."""
    [prompt] = [ids for ids, _ in prompts("longrope") if len(ids) == 50]
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)
    options = {"kv_memory": 2**20, "block_size": 16, "max_model_len": 64, "dtype": "float32"}

    def answers(*asked):
        with LLM(REFERENCE / "longrope", **options) as llm:
            return [llm.generate([ids], params)[0].logprobs for ids in asked]

    short, long = prompt[:30], prompt
    assert answers(short, long, short, long) == [*answers(short), *answers(long)] * 2


# AWQ and GPTQ


@pytest.mark.parametrize("name", PACKED)
def test_weights_are_dequantised_as_their_programs_do(name):
    """To the bit: float16 holds what AutoAWQ and AutoGPTQ compute."""
    checkpoint = open_checkpoint(REFERENCE / name, dtype="float16")
    weights = named_weights(checkpoint.config, checkpoint.weights)
    arrays = {k: array for k, array in golden(name).items() if k.startswith("layers")}
    assert len(arrays) == 2
    for k, expected in arrays.items():
        assert weights[f"model.{k}"].dtype == np.float16
        assert (weights[f"model.{k}"] == expected).all()


KERNEL_FORMATS = {
    "awq": "q4_1",
    "awq_whole_rows_kept_layer": "q4_1",
    "gptq": "q4_1",
    "gptq_sym": "q4_0",
    "gptq_v2": "q4_1",
    "gptq_desc_act": None,
    "gptq_group16": None,
}


@pytest.mark.parametrize("name", PACKED)
def test_what_the_kernels_read(name):
    """Exact where zero points are 8, else within 0.8 % of a scale; without a layout as floats."""
    folder = REFERENCE / name
    loaded, exact = open_checkpoint(folder), open_checkpoint(folder, dtype="float32")
    assert loaded.config.dtype == "float16"
    largest = 0.0
    for found, expected in zip(loaded.weights.layers, exact.weights.layers, strict=True):
        for field in ("q_proj", "o_proj"):
            weight, wanted = getattr(found, field), getattr(expected, field)
            if KERNEL_FORMATS[name] is None:
                assert (weight == wanted.astype(np.float16)).all()
                continue
            assert weight.dtype == KERNEL_FORMATS[name]
            kind = gguf.GGMLQuantizationType[weight.dtype.upper()]
            largest = max(largest, np.abs(gguf.dequantize(weight.payload, kind) - wanted).max())
    scales = max(np.abs(t).max() for k, t in scales_of(folder).items())
    assert largest <= (0.0 if KERNEL_FORMATS[name] == "q4_0" else 15 / 2048 * scales)


def scales_of(folder):
    from codellama_rt.checkpoint.formats.safetensors import read_safetensors

    tensors = read_safetensors(folder / "model.safetensors")
    return {k: t.view().astype(np.float32) for k, t in tensors.items() if k.endswith("scales")}


@pytest.mark.parametrize("name", PACKED)
def test_logits_of_the_kernels_are_near(name):
    """The kernels round activations to 8 bits, as for GGUF files: 2 % of the largest logit."""
    model = open_model(REFERENCE / name, "auto")
    for prompt, logits in prompts(name):
        found = sequence_logits(model, prompt)
        assert np.abs(found - logits).max() < 0.03 * np.abs(logits).max()
        assert (sequence_logits(model, prompt, chunk_size=3) == found).all()


@pytest.mark.parametrize("name", PACKED)
def test_the_graph_reads_them_with_the_same_bits(name):
    checkpoint = open_checkpoint(REFERENCE / name)
    cell = make_model("cpu", checkpoint.config, checkpoint.weights, runtime="graph")
    model = Llama(checkpoint.config, checkpoint.weights)
    for prompt, _ in prompts(name):
        assert (sequence_logits(cell, prompt) == sequence_logits(model, prompt)).all()


@pytest.mark.parametrize("name", [*PACKED, *BIASED])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_estimate_is_what_is_loaded(name, quantization):
    opened = resolve(REFERENCE / name)
    weights = open_checkpoint(REFERENCE / name, quantization=quantization).weights
    loaded = named_weights(replace(opened.config, tie_word_embeddings=False), weights)
    total = sum(weight.nbytes for weight in loaded.values())
    if weights.lm_head is weights.embedding:
        total -= weights.embedding.nbytes
    assert estimate(opened, Plan(quantization=quantization), context=8).weights == total


def test_layers_that_were_not_converted_stay_as_they_are():
    weights = open_checkpoint(REFERENCE / "awq_whole_rows_kept_layer").weights
    assert isinstance(weights.layers[0].up_proj, Quantized)
    assert weights.layers[1].up_proj.dtype == np.float16


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_quantised_and_converted(tmp_path, name):
    folder = REFERENCE / name
    loaded = open_checkpoint(folder, quantization="int8").weights
    convert(folder, tmp_path / "int8", quantization="int8")
    convert(folder, tmp_path / "floats")
    floats, exact = open_checkpoint(tmp_path / "floats"), open_checkpoint(folder, dtype="float16")
    for i, layer in enumerate(loaded.layers):
        again = open_checkpoint(tmp_path / "int8").weights.layers[i]
        assert (again.k_proj.payload == layer.k_proj.payload).all()
        assert (floats.weights.layers[i].k_proj == exact.weights.layers[i].k_proj).all()
    with LLM(folder, kv_memory=2**20) as llm:
        assert len(llm.generate([[1, 5, 6]], SamplingParams(max_tokens=3))[0].token_ids) == 3
