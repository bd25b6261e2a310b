import json
import struct

import ml_dtypes
import numpy as np
import pytest
from helpers.checkpoint_files import (
    TINY,
    gguf_bytes,
    gguf_metadata,
    gguf_tensors,
    mini_gguf,
    mini_gguf_bytes,
)
from helpers.oracle import forward

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.gguf_file import read_gguf
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.errors import CheckpointError, CheckpointWarning
from codellama_rt.model.config import ModelConfig, RopeScaling
from codellama_rt.model.rope import inverse_frequencies
from codellama_rt.ops.dtypes import numpy_dtype

LOGITS_TOLERANCE = 1e-4


def write_gguf(path, name, metadata=None, tensors=None, encode=None):
    """Writes a tiny checkpoint as GGUF; metadata keys and tensors replace or join its own."""
    config = ModelConfig.from_hf(json.loads((TINY / name / "config.json").read_text()))
    stored = {}
    for file in (TINY / name).glob("*.safetensors"):
        stored |= {key: tensor.view() for key, tensor in read_safetensors(file).items()}
    own = gguf_tensors(stored, config, encode)
    path.write_bytes(gguf_bytes(gguf_metadata(config) | (metadata or {}), own | (tensors or {})))
    return path


def assert_golden_logits(checkpoint, name):
    description = json.loads((TINY / name / "golden.json").read_text())
    with np.load(TINY / name / "golden.npz") as arrays:
        for i, case in enumerate(description["cases"]):
            logits = forward(checkpoint.weights, checkpoint.config, case["prompt"])
            assert np.abs(logits - arrays[f"logits_{i}"]).max() < LOGITS_TOLERANCE, (name, i)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("mha_theta1e4_fp32", {}),
        ("gqa_theta1e6_bf16", {}),
        ("hd128_gqa_bf16", {}),
        ("mqa_fp16_sharded", {}),
        ("tied_fp32", {}),
        ("rope_linear4", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ("rope_linear4", {"llama.rope.scale_linear": 4.0}),
        (
            "rope_yarn4",
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
        ),
    ],
)
def test_golden_logits_from_interleaved_rows(tmp_path, name, metadata):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", name, metadata))
    original = open_checkpoint(TINY / name)
    assert checkpoint.config.rope_interleaved
    assert checkpoint.config.dtype == original.config.dtype
    assert checkpoint.stored_bytes == original.stored_bytes
    assert checkpoint.tokenizer_path == checkpoint.path == tmp_path / "a.gguf"
    assert checkpoint.generation_config == {}
    tied = checkpoint.weights.lm_head is checkpoint.weights.embedding
    assert tied == (name == "tied_fp32")
    assert_golden_logits(checkpoint, name)


def test_llama3_comes_as_a_tensor_of_factors(tmp_path):
    config = open_checkpoint(TINY / "rope_llama3").config
    plain = ModelConfig.from_hf(
        json.loads((TINY / "rope_llama3/config.json").read_text()) | {"rope_scaling": None}
    )
    factors = inverse_frequencies(plain)[0] / inverse_frequencies(config)[0]
    raw = factors.astype(np.float32).tobytes()
    tensors = {"rope_freqs.weight": ("F32", factors.shape, raw)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", "rope_llama3", tensors=tensors))
    assert checkpoint.config.rope_scaling.kind == "factors"
    assert_golden_logits(checkpoint, "rope_llama3")


def test_float_tensors_are_views_of_the_file(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", "gqa_theta1e6_bf16"))
    stored = read_gguf(tmp_path / "a.gguf").tensors["blk.2.ffn_down.weight"].view()
    down_proj = checkpoint.weights.layers[2].down_proj
    assert not down_proj.flags.owndata
    assert not down_proj.flags.writeable
    assert np.array_equal(down_proj, stored)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Q8_0", "bfloat16"), ("Q8_0", "float32"), ("Q4_0", "float16"), ("MXFP4", "auto")],
)
def test_quantised_tensors_are_decoded(tmp_path, kind, dtype):
    """When a dtype is asked for, and where no operator takes the type as it lies."""
    gguf = pytest.importorskip("gguf")
    ggml_type = gguf.GGMLQuantizationType[kind]
    decoded = {}

    def encode(name, array):
        if array.ndim == 1:
            return "F32", array.astype(np.float32).tobytes()
        blocks = gguf.quantize(array.astype(np.float32), ggml_type)
        decoded[name] = gguf.dequantize(blocks, ggml_type)
        return kind, blocks.tobytes()

    path = write_gguf(tmp_path / "a.gguf", "hd128_gqa_bf16", encode=encode)
    calls = []
    checkpoint = open_checkpoint(
        path, dtype=dtype, progress=lambda *call: calls.append(call), check="finite"
    )
    expected = "bfloat16" if dtype == "auto" else dtype
    assert checkpoint.config.dtype == expected
    layer = checkpoint.weights.layers[0]
    prefix = "model.layers.0."
    for ours, name in [
        (layer.q_proj, prefix + "self_attn.q_proj.weight"),
        (layer.down_proj, prefix + "mlp.down_proj.weight"),
        (checkpoint.weights.lm_head, "lm_head.weight"),
    ]:
        assert np.array_equal(ours, decoded[name].astype(numpy_dtype(expected)))
    assert layer.mlp_norm.dtype.name == ("float32" if dtype == "auto" else expected)
    assert {what for _, _, what in calls} == {f"converting to {expected}", "checking for NaN"}


def test_header_equals_that_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "a.gguf", "gqa_theta1e6_bf16")
    ours, reference = read_gguf(path), gguf.GGUFReader(path)
    for key, value in ours.metadata.items():
        assert reference.fields[key].contents() == value
    assert len(ours.tensors) == len(reference.tensors)
    for tensor in reference.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(tensor.shape[::-1].tolist())
        assert found.payload.tobytes() == tensor.data.tobytes()


METADATA, TENSORS = mini_gguf()


def test_the_good_file_opens(tmp_path):
    (tmp_path / "a").write_bytes(gguf_bytes(METADATA, TENSORS))
    config = open_checkpoint(tmp_path / "a").config
    assert config.norm_eps == 1e-6
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__vocab_size": 12}, "llama.vocab_size: expected 10, the rows.*found 12"),
        ({"llama__vocab_size": struct.pack("<Ii", 5, -1)}, "llama.vocab_size: .*found -1"),
        ({"tokenizer__ggml__tokens": ["a"] * 12}, "ggml.tokens: expected 10, the rows.*found 12"),
        ({"tokenizer__ggml__tokens": ["a"] * 8}, "ggml.tokens: expected 10, the rows.*found 8"),
        (
            {"tokenizer__ggml__eos_token_id": 2**32 - 1},
            "eos_token_id: 4294967295 is none of the 10",
        ),
        ({"tokenizer__ggml__eot_token_id": 128009}, "eot_token_id: 128009 is none of the 10"),
        ({"tokenizer__ggml__bos_token_id": 10}, "bos_token_id: 10 is none of the 10"),
    ],
)
def test_what_does_not_fit_the_embedding_is_warned_of(tmp_path, changes, message):
    """llama.cpp opens such files: the embedding decides, and an id outside it means none."""
    (tmp_path / "a").write_bytes(mini_gguf_bytes(**changes))
    with pytest.warns(CheckpointWarning, match=message):
        checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.config.vocab_size == 10
    for token_id in (checkpoint.config.bos_token_id, *checkpoint.config.eos_token_ids):
        assert token_id in (1, 2, None)


def test_float64_in_a_gguf_file(tmp_path):
    metadata, tensors = mini_gguf()
    wide = {
        name: ("F64", shape, np.frombuffer(raw, np.float32).astype(np.float64).tobytes())
        for name, (_, shape, raw) in tensors.items()
    }
    (tmp_path / "wide").write_bytes(gguf_bytes(metadata, wide))
    (tmp_path / "plain").write_bytes(gguf_bytes(metadata, tensors))
    found, expected = open_checkpoint(tmp_path / "wide"), open_checkpoint(tmp_path / "plain")
    assert found.config == expected.config
    assert (found.weights.lm_head == expected.weights.lm_head).all()


def test_rotary_tables_in_a_gguf_file_are_left_alone(tmp_path):
    metadata, tensors = mini_gguf()
    tensors["blk.0.attn_rot_embd.weight"] = ("F32", (4,), bytes(16))
    (tmp_path / "a").write_bytes(gguf_bytes(metadata, tensors))
    assert open_checkpoint(tmp_path / "a").config.n_layers == 1


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"tokenizer__ggml__eot_token_id": 7}, "eos_token_ids", (2, 7)),
        ({"tokenizer__ggml__eos_token_id": ...}, "eos_token_ids", ()),
        ({"tokenizer__ggml__bos_token_id": ...}, "bos_token_id", None),
        ({"llama__rope__freq_base": ...}, "rope_theta", 10000.0),
        ({"llama__attention__key_length": ...}, "head_dim", 4),
        ({"tokenizer__ggml__tokens": ...}, "vocab_size", 10),
        ({"llama__rope__scaling__type": "none"}, "rope_scaling", None),
        ({"llama__rope__scaling__factor": 0.0}, "rope_scaling", None),
        (
            {"llama__rope__scaling__factor": 2.0},
            "rope_scaling",
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__yarn_beta_fast": 16.0,
                "llama__rope__scaling__yarn_beta_slow": 2.0,
                "llama__rope__scaling__yarn_ext_factor": 1.0,
                "llama__rope__scaling__attn_factor": 1.0,
            },
            "rope_scaling",
            RopeScaling("yarn", 2.0, 64, beta_fast=16.0, beta_slow=2.0),
        ),
        (
            {"llama__feed_forward_length": struct.pack("<IIQ2I", 9, 4, 2, 12, 12)},
            "hidden_dim",
            12,
        ),
    ],
)
def test_metadata(tmp_path, changes, field, expected):
    (tmp_path / "a").write_bytes(mini_gguf_bytes(**changes))
    assert getattr(open_checkpoint(tmp_path / "a").config, field) == expected


def test_yarn_attention_factor_multiplies_the_usual_one(tmp_path):
    changes = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__attn_factor": 0.5,
    }
    (tmp_path / "a").write_bytes(mini_gguf_bytes(**changes))
    scaling = open_checkpoint(tmp_path / "a").config.rope_scaling
    assert scaling.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4) + 1))


def test_types_that_cannot_be_decoded(tmp_path):
    shape = TENSORS["output.weight"][1]
    tensors = TENSORS | {"output.weight": ("I32", shape, bytes(4 * shape[0] * shape[1]))}
    (tmp_path / "a").write_bytes(gguf_bytes(METADATA, tensors))
    with pytest.raises(CheckpointError, match=r"output.weight.*gguf package can decode, found I32"):
        open_checkpoint(tmp_path / "a")


def test_check_finite_reads_decoded_blocks(tmp_path):
    gguf = pytest.importorskip("gguf")

    def encode(name, array):
        if "down_proj" not in name:
            return "F32", array.astype(np.float32).tobytes()
        blocks = gguf.quantize(array.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        blocks[0, :2] = np.array([np.nan], np.float16).view(np.uint8)  # the first block's scale
        return "Q8_0", blocks.tobytes()

    path = write_gguf(tmp_path / "a.gguf", "mqa_fp16_sharded", encode=encode)
    open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down.weight.*found nan in row 0"):
        open_checkpoint(path, check="finite")


def test_norms_may_be_of_any_dtype(tmp_path):
    def encode(name, array):
        dtype = np.float32 if array.ndim == 1 else ml_dtypes.bfloat16
        return ("F32" if array.ndim == 1 else "BF16"), array.astype(dtype).tobytes()

    checkpoint = open_checkpoint(write_gguf(tmp_path / "a", "gqa_theta1e6_bf16", encode=encode))
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.weights.norm.dtype == np.float32
    assert_golden_logits(checkpoint, "gqa_theta1e6_bf16")
