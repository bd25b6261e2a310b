"""Conversion between layouts: bit for bit, there and back, and through any interruption."""

import shutil

import numpy as np
import pytest
from helpers.checkpoint_files import (
    MINI_CONFIG,
    TINY,
    mini_gguf_bytes,
    write_mini,
)
from helpers.conversion_contents import contents
from helpers.quantized_models import large_model, q8_model, resident_bytes

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats import tensor_file
from codellama_rt.checkpoint.formats.pth import read_pth
from codellama_rt.checkpoint.tensor_names import expected_shapes
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.llama import Llama
from codellama_rt.tools.convert import plan as plan_module
from codellama_rt.tools.convert.convert import convert
from codellama_rt.tools.convert.journal import Journal

NAMES = {"meta_1shard_bf16": 1, "meta_2shard_gqa_bf16": 2}


@pytest.mark.parametrize("name", NAMES)
def test_metas_files_become_the_neighbour_and_back(shared_dir, tmp_path, name):
    source = shared_dir / "data" / "tiny" / name
    convert(source, tmp_path / "hf", verify=True)
    assert contents(tmp_path / "hf") == contents(source.with_name(f"{name}_hf"))
    convert(tmp_path / "hf", tmp_path / "meta", to="meta", shards=NAMES[name], verify=True)
    for file in sorted(source.glob("*.pth")):
        ours, theirs = read_pth(tmp_path / "meta" / file.name), read_pth(file)
        assert ours.keys() == theirs.keys() - {"rope.freqs"}
        for key, tensor in ours.items():
            assert (tensor.encoding, tensor.shape) == (theirs[key].encoding, theirs[key].shape)
            assert tensor.payload.tobytes() == theirs[key].payload.tobytes(), key


@pytest.mark.parametrize(
    ("name", "shards"),
    [("gqa_theta1e6_bf16", 1), ("gqa_theta1e6_bf16", 2), ("hd128_gqa_bf16", 1),
     ("mha_theta1e4_fp32", 1), ("mha_theta1e4_fp32", 4)],
)  # fmt: skip
def test_there_and_back_is_the_same(tmp_path, name, shards):
    convert(TINY / name, tmp_path / "meta", to="meta", shards=shards, verify=True)
    convert(tmp_path / "meta", tmp_path / "hf", verify=True)
    assert contents(tmp_path / "hf") == contents(TINY / name)
    expected, found = (open_checkpoint(f).config for f in (TINY / name, tmp_path / "hf"))
    ignored = {"max_position_embeddings": 0}  # not in params.json
    assert vars(found) | ignored == vars(expected) | ignored


def test_shards_can_be_cut_anew(tmp_path):
    """8 from 4 from 1: as many as the model has key-value heads."""
    config = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
              "intermediate_size": 176, "vocab_size": 16}  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = expected_shapes(ModelConfig.from_hf(MINI_CONFIG | config))
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    source = write_mini(tmp_path / "in", tensors, **config)
    convert(source, tmp_path / "4", to="meta", shards=4)
    convert(tmp_path / "4", tmp_path / "8", to="meta", shards=8, verify=True)
    convert(tmp_path / "8", tmp_path / "hf", verify=True)
    assert contents(tmp_path / "hf") == contents(source)


@pytest.mark.parametrize("name", ["gqa_theta1e6_bf16", "tied_fp32"])
def test_quantising_metas_files_is_quantising_hugging_faces(tmp_path, name):
    convert(TINY / name, tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "a", quantization="int4", verify=True)
    convert(TINY / name, tmp_path / "b", quantization="int4", verify=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_gguf_becomes_hugging_faces(tmp_path):
    path = q8_model(tmp_path / "a.gguf", "mha_theta1e4_fp32")
    convert(path, tmp_path / "hf", dtype="float32", verify=True)
    decoded, written = open_checkpoint(path, dtype="float32"), open_checkpoint(tmp_path / "hf")
    assert not written.config.rope_interleaved
    prompt = [1, 2, 3, 4, 5]
    a, b = (sequence_logits(Llama(c.config, c.weights), prompt) for c in (decoded, written))
    assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
    convert(path, tmp_path / "auto", verify=True)
    assert {encoding for encoding, *_ in contents(tmp_path / "auto").values()} == {"BF16"}


def test_a_gguf_file_of_floats_stays_the_same(tmp_path):
    (tmp_path / "a.gguf").write_bytes(mini_gguf_bytes())
    convert(tmp_path / "a.gguf", tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(write_mini(tmp_path / "expected"))


def test_a_dtype_is_that_of_all_floats(tmp_path):
    convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", dtype="float16", verify=True)
    assert {encoding for encoding, *_ in contents(tmp_path / "out").values()} == {"F16"}
    assert open_checkpoint(tmp_path / "out").config.dtype == "float16"


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_FILE_BYTES", 200_000)
    convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", dtype="float32", verify=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    expected = open_checkpoint(TINY / "gqa_theta1e6_bf16", dtype="float32").weights.lm_head
    assert np.array_equal(open_checkpoint(tmp_path / "out").weights.lm_head, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "onnx"}, "to must be one of huggingface, meta, got 'onnx'"),
        ({"dtype": "int8"}, "dtype must be one of auto"),
        (
            {"to": "meta", "quantization": "int8"},
            "Meta's layout does not support quantised weights",
        ),
        ({"shards": 2, "quantization": "int8"}, "shards must be 1 or more files of Meta's layout"),
        ({"to": "meta", "shards": 0}, "shards must be 1 or more files of Meta's layout, got 0"),
        ({"to": "meta", "shards": 3}, "3 shards are not possible: .* n_kv_heads 2"),
        ({}, "already in that layout; give a quantization, a dtype or to='meta'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_metas_layout_cannot_say(tmp_path):
    with pytest.raises(ValueError, match=r"params.json does not support RoPE scaling"):
        convert(TINY / "rope_linear4", tmp_path / "out", to="meta")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"GB are needed, and the disk has 0\.00 GB"):
        convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", to="meta")
    assert not (tmp_path / "out").exists()


def test_one_conversion_at_a_time(tmp_path):
    with Journal(tmp_path / "out", {}), pytest.raises(RuntimeError, match="by another process"):
        convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", to="meta")


def test_verification_finds_a_wrong_byte(tmp_path, monkeypatch):
    real = tensor_file._write_entry

    def damaged(file, layout, i):
        checksum = real(file, layout, i)
        if i == 3:
            file.seek(-1, 1)
            file.write(b"\x55")
        return checksum

    monkeypatch.setattr(tensor_file, "_write_entry", damaged)
    with pytest.raises(CheckpointError, match="expected the bytes that were written"):
        convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", to="meta", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_rows_in_a_wrong_order(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "pairs_first", lambda rows, head_dim: rows)
    with pytest.raises(CheckpointError, match="expected the logits of"):
        convert(TINY / "gqa_theta1e6_bf16", tmp_path / "out", to="meta", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_source_in_shards_is_let_go(tmp_path):
    convert(large_model(tmp_path / "in"), tmp_path / "meta", to="meta")
    file, seen = tmp_path / "meta" / "consolidated.00.pth", []
    convert(tmp_path / "meta", tmp_path / "hf",
            progress=lambda *_: seen.append(resident_bytes(file)))  # fmt: skip
    assert len(seen) >= 12
    assert max(seen) <= 3 * 2**20
