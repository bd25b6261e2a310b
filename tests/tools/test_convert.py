"""convert: what it writes opens as it lies and equals quantising at load; faults leave nothing."""

import json
import mmap
import os

import numpy as np
import pytest
from helpers.checkpoint_files import TINY, mini_tensors, write_mini
from helpers.quantized_models import floats, large_model, mapping_under, projections, resident_bytes
from helpers.tiny_llm import make_folder

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.safetensors import read_safetensors, read_safetensors_file
from codellama_rt.checkpoint.quantize import QUANTIZATIONS
from codellama_rt.errors import CheckpointError
from codellama_rt.ops.quantized import Quantized, weight_num_bytes
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.tools.convert.convert import convert

NAMES = ["gqa_theta1e6_bf16", "mqa_fp16_sharded", "tied_fp32"]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_quantising_at_load(tmp_path, name, quantization):
    assert convert(TINY / name, tmp_path / "out", quantization=quantization) == tmp_path / "out"
    converted = open_checkpoint(tmp_path / "out")
    loaded = open_checkpoint(TINY / name, quantization=quantization)
    for a, b in zip(projections(converted.weights), projections(loaded.weights), strict=True):
        assert isinstance(a, Quantized)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (quantization, b.shape)
        assert np.array_equal(a.payload.reshape(-1), b.payload.reshape(-1))
    for a, b in zip(floats(converted.weights), floats(loaded.weights), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert (
        converted.config.dtype == loaded.config.dtype == open_checkpoint(TINY / name).config.dtype
    )
    assert not converted.config.tie_word_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_as_views_of_one_mapping(tmp_path, name):
    convert(TINY / name, tmp_path / "out", quantization="int4")
    checkpoint = open_checkpoint(tmp_path / "out")
    payloads = [weight.payload for weight in projections(checkpoint.weights)]
    mappings = {id(mapping_under(a)) for a in [*payloads, *floats(checkpoint.weights)]}
    assert len(mappings) == 1
    assert isinstance(mapping_under(payloads[0]), mmap.mmap)
    assert all(payload.ctypes.data % 64 == 0 for payload in payloads)
    assert not any(payload.flags.writeable for payload in payloads)
    assert checkpoint.mapped_bytes == checkpoint.stored_bytes
    expected = sum(weight_num_bytes("int4", w.shape) for w in projections(checkpoint.weights))
    assert checkpoint.stored_bytes == expected + sum(a.nbytes for a in floats(checkpoint.weights))


def test_opening_with_the_quantization_it_has(tmp_path):
    convert(TINY / NAMES[0], tmp_path / "out", quantization="int8")
    assert open_checkpoint(tmp_path / "out", quantization="int8").weights.lm_head.dtype == "int8"
    with pytest.raises(CheckpointError, match="quantise to int4, found them in int8 already"):
        open_checkpoint(tmp_path / "out", quantization="int4")
    with pytest.raises(CheckpointError, match="already quantised to int8; convert the original"):
        convert(tmp_path / "out", tmp_path / "again", quantization="int4")


def test_a_dtype_changes_the_floats_alone(tmp_path):
    convert(TINY / NAMES[0], tmp_path / "out", quantization="int4")
    checkpoint = open_checkpoint(tmp_path / "out", dtype="float32", check="finite")
    assert checkpoint.config.dtype == "float32"
    assert {a.dtype.name for a in floats(checkpoint.weights)} == {"float32"}
    assert {w.dtype for w in projections(checkpoint.weights)} == {"int4"}


def test_the_companions_are_copied(tmp_path):
    source = make_folder(tmp_path / "in", generation_config={"top_p": 0.5})
    (source / "notes.txt").write_text("not of the model")
    convert(source, tmp_path / "out", quantization="int4")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == names
    for name in ("generation_config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out")
    )
    section = {"quant_method": "codellama_rt", "format_version": 2, "dtype": "int4"}
    assert after == before | {"tie_word_embeddings": False, "quantization_config": section}


@pytest.mark.parametrize("to", ["huggingface", "meta"])
def test_added_tokens_are_kept(tmp_path, to):
    source = make_folder(tmp_path / "in")
    files = {
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "added_tokens.json": {"<|im_start|>": 421, "<|im_end|>": 422},
    }
    for name, contents in files.items():
        (source / name).write_text(json.dumps(contents))
    quantization = "int8" if to == "huggingface" else None
    convert(source, tmp_path / "out", to=to, quantization=quantization)
    before, after = (load_tokenizer(folder) for folder in (source, tmp_path / "out"))
    text = "<|im_start|> a<|im_end|>\nb"
    assert after.encode(text, parse_special=True) == before.encode(text, parse_special=True)
    assert (after.eos_id, after.end_ids) == (422, before.end_ids)


def test_other_readers_can_read_the_file(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    convert(TINY / "tied_fp32", tmp_path / "out", quantization="int8")
    ours = read_safetensors(tmp_path / "out" / "model.safetensors")
    theirs = reference.load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.tobytes() == ours[name].payload.tobytes()


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    convert(
        TINY / NAMES[0], tmp_path / "out", quantization="int8",
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    done, totals, what = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == open_checkpoint(tmp_path / "out").stored_bytes
    assert set(what) == {"quantising to int8", "copying"}


def test_a_source_is_let_go_after_each_tensor(tmp_path):
    source, seen = large_model(tmp_path / "in"), []
    file = source / "model.safetensors"
    convert(source, tmp_path / "out", quantization="int4",
            progress=lambda *_: seen.append(resident_bytes(file)))  # fmt: skip
    assert len(seen) == 12
    assert max(seen) <= 3 * 2**20  # one huge page, which holds the header; the file has 23 MB


class Stopped(BaseException):
    """As an interrupt comes: not an Exception."""


@pytest.mark.parametrize("when", [1, 5, 12])
def test_an_interrupted_run_leaves_nothing_that_opens(tmp_path, when):
    source, calls = write_mini(tmp_path / "in"), []

    def progress(*call):
        calls.append(call)
        if len(calls) == when:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", quantization="int4", progress=progress)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", ".out.partial"}
    with pytest.raises(CheckpointError, match=r"expected config\.json"):
        open_checkpoint(tmp_path / ".out.partial" / "out")
    convert(source, tmp_path / "out", quantization="int4")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "out"}


def test_what_is_there_is_not_touched(tmp_path):
    source = write_mini(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out already exists; give --out another name"):
        convert(source, tmp_path / "out", quantization="int4")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_converted(tmp_path):
    source = write_mini(tmp_path / "in")
    for quantization in ("int2", "q4_0"):
        with pytest.raises(ValueError, match="int8"):
            convert(source, tmp_path / "out", quantization=quantization)
    with pytest.raises(ValueError, match="already in that layout; give a quantization"):
        convert(source, tmp_path / "out")
    tensors = mini_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    write_mini(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match=r"up_proj.weight.*finite values .* nan at \[3, 4\]"):
        convert(tmp_path / "in", tmp_path / "out", quantization="int4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_metadata_describes_every_quantised_tensor(tmp_path):
    convert(TINY / NAMES[0], tmp_path / "out", quantization="int4")
    file = tmp_path / "out" / "model.safetensors"
    stored, metadata = read_safetensors_file(file)
    assert metadata["codellama_rt.format_version"] == "2"
    described = json.loads(metadata["codellama_rt.quantized"])
    assert set(described) == {name for name, tensor in stored.items() if tensor.encoding == "U8"}
    assert described["lm_head.weight"] == {"dtype": "int4", "shape": [512, 128]}
    assert (
        os.stat(file).st_mode & 0o777 == os.stat(tmp_path / "out" / "config.json").st_mode & 0o777
    )
