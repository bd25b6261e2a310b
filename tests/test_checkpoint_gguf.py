import json
import struct
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    MINI_CONFIG,
    TINY,
    gguf_bytes,
    gguf_metadata,
    gguf_string,
    gguf_tensors,
    gguf_value,
    write_mini,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import forward

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.config import ModelConfig, RopeScaling
from codellama_rt.errors import CheckpointError
from codellama_rt.gguf_file import read_gguf
from codellama_rt.rope import inverse_frequencies
from codellama_rt.weight_loading import expected_shapes

LOGITS_TOLERANCE = 1e-4


def write_gguf(path, name, metadata=None, tensors=None, encode=None):
    """Writes a tiny checkpoint as GGUF; metadata keys and tensors replace or join its own."""
    config = ModelConfig.from_hf(json.loads((TINY / name / "config.json").read_text()))
    own = gguf_tensors(TINY / name, config, encode)
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


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_tensors_are_decoded(tmp_path, kind, dtype):
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
        assert np.array_equal(ours, decoded[name].astype(expected))
    assert layer.mlp_norm.dtype == ("float32" if dtype == "auto" else expected)
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


def mini_config():
    return ModelConfig.from_hf(MINI_CONFIG)


def mini_gguf_tensors():
    with tempfile.TemporaryDirectory() as folder:
        return gguf_tensors(write_mini(Path(folder)), mini_config())


METADATA = gguf_metadata(mini_config())
TENSORS = mini_gguf_tensors()
GOOD = gguf_bytes(METADATA, TENSORS)
HEADER_END = len(GOOD) - sum(len(raw) + -len(raw) % 32 for _, _, raw in TENSORS.values())
NORM = "output_norm.weight"
Q = "blk.0.attn_q.weight"


def metadata_with(**changes):
    """The good file with metadata replaced (a key's dots are written __); ... removes a key."""
    metadata = METADATA | {key.replace("__", "."): value for key, value in changes.items()}
    return gguf_bytes({k: v for k, v in metadata.items() if v is not ...}, TENSORS)


def tensors_with(changes, **metadata):
    tensors = {k: v for k, v in (TENSORS | changes).items() if v is not ...}
    return gguf_bytes(METADATA | metadata, tensors)


def test_the_good_file_opens(tmp_path):
    (tmp_path / "a").write_bytes(GOOD)
    config = open_checkpoint(tmp_path / "a").config
    assert config.norm_eps == 1e-6
    assert config.rope_theta == 10000.0


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
    (tmp_path / "a").write_bytes(metadata_with(**changes))
    assert getattr(open_checkpoint(tmp_path / "a").config, field) == expected


def test_yarn_attention_factor_multiplies_the_usual_one(tmp_path):
    changes = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__attn_factor": 0.5,
    }
    (tmp_path / "a").write_bytes(metadata_with(**changes))
    scaling = open_checkpoint(tmp_path / "a").config.rope_scaling
    assert scaling.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4) + 1))


def head(version=3, n_tensors=0, n_keys=0):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key_value(value):
    return head(n_keys=1) + gguf_string("k") + value


def entry(name="t", n_axes=1, axes=(4,), kind=0, offset=0):
    axes = struct.pack(f"<{len(axes)}Q", *axes)
    raw = gguf_string(name) + struct.pack("<I", n_axes) + axes + struct.pack("<IQ", kind, offset)
    return head(n_tensors=1) + raw + bytes(256)


def floats(*shape):
    return "F32", shape, np.ones(shape, np.float32).tobytes()


YARN = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 2.0}
BAD_FILES = {
    "empty": (b"", "found an empty file"),
    "another file": (
        b"PK\x03\x04" + bytes(64),
        "b'GGUF', found b'PK.*the directory that safetensors",
    ),
    "3 bytes": (b"GGU", "expected 4 bytes at offset 0, found 3; the file is truncated"),
    "version 1": (head(1), "GGUF version 2 or 3, little-endian, found version 1"),
    "version 4": (head(4), "found version 4"),
    "big-endian": (head(3 << 24), "found a big-endian file"),
    "no counts": (head()[:12], "truncated"),
    "2**64 keys": (head(n_keys=2**64 - 1) + bytes(100), "truncated|twice"),
    "2**64 tensors": (head(n_tensors=2**64 - 1) + bytes(100), "expected 1 to 4 axes"),
    "key past the end": (head(n_keys=1) + struct.pack("<Q", 60_000), "truncated"),
    "key too long": (head(n_keys=1) + struct.pack("<Q", 2**40), "at most 65535 bytes"),
    "key not UTF-8": (head(n_keys=1) + gguf_string(b"\xff") + gguf_value(1), "expected UTF-8"),
    "key twice": (
        head(n_keys=2) + 2 * (gguf_string("k") + gguf_value(1)),
        "metadata key 'k': expected it once, found it twice",
    ),
    "value type": (key_value(struct.pack("<IQ", 13, 0)), "value type from 0 to 12, found 13"),
    "string past the end": (key_value(struct.pack("<IQ", 8, 2**63)), "expected a string to end"),
    "array past the end": (key_value(struct.pack("<IIQ", 9, 4, 2**62)), "truncated or damaged"),
    "array of arrays": (key_value(struct.pack("<IIQ", 9, 9, 1)), "numbers or strings, .* type 9"),
    "2**60 strings": (key_value(struct.pack("<IIQ", 9, 8, 2**60)), "expected a string to end"),
    "no axes": (entry(n_axes=0, axes=()), "tensor 't': expected 1 to 4 axes, found 0"),
    "5 axes": (entry(n_axes=5, axes=(1,) * 5), "expected 1 to 4 axes, found 5"),
    "axis of 0": (entry(axes=(0,)), "expected axes from 1 to"),
    "axis of 2**63": (entry(axes=(2**63,)), "expected axes from 1 to"),
    "axes that wrap": (entry(n_axes=4, axes=(2**32,) * 4), "it is truncated"),
    "ggml type": (entry(kind=999), "expected a ggml type the gguf package knows, found 999"),
    "rows of no block": (entry(kind=8), "rows of a multiple of 32 for Q8_0"),
    "unaligned offset": (entry(offset=4), "an offset that is a multiple of 32, found 4"),
    "offset past the end": (entry(offset=2**62), "it is truncated"),
    "alignment 0": (metadata_with(general__alignment=0), "expected a power of two, found 0"),
    "alignment 48": (metadata_with(general__alignment=48), "expected a power of two"),
    "alignment text": (metadata_with(general__alignment="32"), "expected a power of two"),
    "truncated": (GOOD[:-33], "it is truncated"),
    "half": (GOOD[: len(GOOD) // 2], "truncated"),
    "overlap": (gguf_bytes(METADATA, TENSORS, offsets={NORM: 0}), "it overlaps"),
    "tensor twice": (
        gguf_bytes(METADATA, TENSORS | {"output_norm.weighT": floats(8)}).replace(
            b"weighT", b"weight"
        ),
        f"{NORM}.*expected it once, found it twice",
    ),
    "no architecture": (metadata_with(general__architecture=...), "'llama', found 'nothing'"),
    "another architecture": (
        metadata_with(general__architecture="qwen2"),
        "general.architecture: expected 'llama', found 'qwen2'; no other architecture",
    ),
    "a part of a split": (metadata_with(split__count=3), "llama-gguf-split --merge"),
    "experts": (metadata_with(llama__expert_count=8), "mixtures of experts"),
    "no layers": (metadata_with(llama__block_count=...), "llama.block_count: expected an integer"),
    "0 layers": (metadata_with(llama__block_count=0), "llama.block_count"),
    "a layer too few": (metadata_with(llama__block_count=2), "'blk.1.attn_norm.weight'.*none of"),
    "no context": (metadata_with(llama__context_length=...), "llama.context_length"),
    "no eps": (metadata_with(llama__attention__layer_norm_rms_epsilon=...), "rms_epsilon"),
    "text for a number": (metadata_with(llama__embedding_length="8"), "embedding_length"),
    "0 heads": (metadata_with(llama__attention__head_count=0), "head_count"),
    "3 key-value heads": (metadata_with(llama__attention__head_count_kv=3), "found 2 and 3"),
    "heads that differ": (
        metadata_with(llama__attention__head_count_kv=struct.pack("<IIQ2I", 9, 4, 2, 1, 2)),
        "head_count_kv: expected an integer",
    ),
    "heads that do not divide": (
        metadata_with(llama__attention__head_count=3, llama__attention__key_length=...),
        "a multiple of the 3 heads",
    ),
    "value length": (metadata_with(llama__attention__value_length=8), r"size of a head \(4\)"),
    "partial rotation": (metadata_with(llama__rope__dimension_count=2), r"size of a head \(4\)"),
    "another vocabulary": (metadata_with(llama__vocab_size=12), "expected 12 tokens.*found 10"),
    "more tokens": (
        metadata_with(tokenizer__ggml__tokens=["a"] * 12),
        r"token_embd.weight.*shape \(12, 8\), found \(10, 8\)",
    ),
    "scaling kind": (metadata_with(llama__rope__scaling__type="longrope"), "none, linear, yarn"),
    "negative factor": (metadata_with(llama__rope__scaling__factor=-1.0), "scaling.factor"),
    "yarn extrapolation": (
        metadata_with(**YARN, llama__rope__scaling__yarn_ext_factor=0.5),
        "yarn_ext_factor: expected 1",
    ),
    "yarn log multiplier": (
        metadata_with(**YARN, llama__rope__scaling__yarn_log_multiplier=0.1),
        "yarn_log_multiplier: expected 0",
    ),
    "factors and scaling": (
        tensors_with({"rope_freqs.weight": floats(2)}, **{"llama.rope.scaling.factor": 2.0}),
        "rope_freqs.weight.*expected none beside rope scaling 'linear'",
    ),
    "too many factors": (tensors_with({"rope_freqs.weight": floats(4)}), r"F32 \(2,\), found"),
    "factors of 0": (
        tensors_with({"rope_freqs.weight": ("F32", (2,), bytes(8))}),
        "finite factors above 0",
    ),
    "no norm": (tensors_with({NORM: ...}), f"{NORM}.*found none of that name"),
    "no embedding": (tensors_with({"token_embd.weight": ...}), "token_embd.weight.*none"),
    "a bias": (tensors_with({"blk.0.attn_q.bias": floats(8)}), "blk.0.attn_q.bias.*found this one"),
    "a shape": (tensors_with({Q: floats(4, 8)}), rf"{Q}.*expected shape \(8, 8\), found \(4, 8\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert str(tmp_path / "model.gguf") in str(caught.value)


def test_no_embedding_and_no_vocabulary(tmp_path):
    metadata = {k: v for k, v in METADATA.items() if k != "tokenizer.ggml.tokens"}
    tensors = {k: v for k, v in TENSORS.items() if k != "token_embd.weight"}
    (tmp_path / "a").write_bytes(gguf_bytes(metadata, tensors))
    with pytest.raises(CheckpointError, match=r"expected tensor 'token_embd.weight'"):
        open_checkpoint(tmp_path / "a")


def test_types_that_cannot_be_decoded(tmp_path):
    shape = expected_shapes(mini_config())["lm_head.weight"]
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
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down.weight.*found nan at \[0, 0\]"):
        open_checkpoint(path, check="finite")


def test_norms_may_be_of_any_dtype(tmp_path):
    def encode(name, array):
        dtype = np.float32 if array.ndim == 1 else ml_dtypes.bfloat16
        return ("F32" if array.ndim == 1 else "BF16"), array.astype(dtype).tobytes()

    checkpoint = open_checkpoint(write_gguf(tmp_path / "a", "gqa_theta1e6_bf16", encode=encode))
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.weights.norm.dtype == np.float32
    assert_golden_logits(checkpoint, "gqa_theta1e6_bf16")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, 64),
)
def test_mutated_files(changes, cut):
    mutated = bytearray(GOOD)
    for place, value in changes:
        mutated[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        path.write_bytes(mutated[: len(GOOD) - cut])
        message = str(path)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
        assert str(path) in message
