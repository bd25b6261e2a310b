"""Files that convert wrote, damaged one way at a time: refused by file, tensor and reason."""

import json

import pytest
from helpers.checkpoint_files import join_safetensors, write_mini

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.formats.strict_json import parse_object
from codellama_rt.errors import CheckpointError
from codellama_rt.tools.convert.convert import convert

Q_PROJ, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
QUANTIZED = "codellama_rt.quantized"


@pytest.fixture
def folder(tmp_path):
    return convert(write_mini(tmp_path / "in"), tmp_path / "out", quantization="int4")


def rewrite(folder, change):
    """Changes the header of the file: change(header, described tensors)."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = parse_object(raw[8:end], "header")
    described = json.loads(header["__metadata__"][QUANTIZED])
    change(header, described)
    if QUANTIZED in header.get("__metadata__", {}):
        header["__metadata__"][QUANTIZED] = json.dumps(described)
    file.write_bytes(join_safetensors(header, raw[end:]))


def test_the_rewritten_file_opens(folder):
    rewrite(folder, lambda header, described: None)
    assert open_checkpoint(folder).weights.lm_head.dtype == "int4"


FAULTS = {
    "version": (
        lambda h, d: h["__metadata__"].update({"codellama_rt.format_version": "1"}),
        r"format_version': expected '2', found '1'",
    ),
    "no version": (
        lambda h, d: h["__metadata__"].pop("codellama_rt.format_version"),
        r"format_version': expected '2', found None",
    ),
    "no metadata": (lambda h, d: h.pop("__metadata__"), r"format_version': expected '2'"),
    "no description": (lambda h, d: h["__metadata__"].pop(QUANTIZED), r"quantized': expected JSON"),
    "undescribed": (
        lambda h, d: d.pop(HEAD),
        rf"{HEAD}': expected shape \(10, 8\), found \(\d+,\)",
    ),
    "no such tensor": (
        lambda h, d: d.update({"x_proj.weight": d[HEAD]}),
        "'x_proj.weight': expected it beside the metadata .* no such tensor",
    ),
    "a norm": (
        lambda h, d: d.update({"model.norm.weight": d[HEAD]}),
        "'model.norm.weight': expected only projections and the head to be quantised",
    ),
    "no object": (lambda h, d: d.update({HEAD: 3}), rf"{HEAD}': expected metadata of dtype and"),
    "a key more": (
        lambda h, d: d[HEAD].update(bits=4),
        rf"{HEAD}': expected metadata of dtype and",
    ),
    "dtype": (lambda h, d: d[HEAD].update(dtype="int2"), rf"{HEAD}': .*int8, int4, found 'int2'"),
    "GGUF's dtype": (lambda h, d: d[HEAD].update(dtype="q4_0"), rf"{HEAD}': .*found 'q4_0'"),
    "other dtype": (
        lambda h, d: d[HEAD].update(dtype="int8"),
        rf"{HEAD}': expected \d+ bytes in U8 for int8 \(10, 8\), found \d+ in U8",
    ),
    "shape": (
        lambda h, d: d[HEAD].update(shape=[100, 8]),
        rf"{HEAD}': expected \d+ bytes in U8 for int4 \(100, 8\), found",
    ),
    "another model's shape": (
        lambda h, d: d[HEAD].update(shape=[9, 8]),
        rf"{HEAD}': expected shape \(10, 8\), found \(9, 8\)",
    ),
    "one axis": (lambda h, d: d[HEAD].update(shape=[80]), rf"{HEAD}': expected a shape of two"),
    "negative": (lambda h, d: d[HEAD].update(shape=[-10, -8]), "two positive integers"),
    "fraction": (lambda h, d: d[HEAD].update(shape=[10.0, 8]), "two positive integers"),
    "huge": (lambda h, d: d[HEAD].update(shape=[2**60, 2**60]), "two positive integers"),
    "floats": (
        lambda h, d: h[HEAD].update(dtype="F32", shape=[h[HEAD]["shape"][0] // 4]),
        rf"{HEAD}': expected \d+ bytes in U8 .* in F32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_header(folder, fault):
    change, message = FAULTS[fault]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("cut", [1, 64, 1000])
def test_a_truncated_file(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="the file is truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"format_version": 3}, "format_version 2, found 3; a newer codellama_rt may support it"),
        ({"format_version": None}, "format_version 2, found None"),
        ({"dtype": "int3"}, "dtype to be one of int8, int4, found 'int3'"),
        ({"quant_method": "bitsandbytes"}, "quantization_config.*unquantised weights"),
    ],
)
def test_a_fault_of_config_json(folder, section, message):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= section
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_config_that_does_not_say_it(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected shape .* found \(\d+,\)"):
        open_checkpoint(folder)


def test_a_config_that_says_it_of_floats(tmp_path, folder):
    (tmp_path / "in" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="format_version': expected '2', found None"):
        open_checkpoint(tmp_path / "in")


def test_scales_that_are_not_finite(folder):
    file = folder / "model.safetensors"
    first = min(read_safetensors(file).values(), key=lambda tensor: tensor.payload.ctypes.data)
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin : begin + first.payload.nbytes] = b"\xff" * first.payload.nbytes
    file.write_bytes(raw)
    open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{first.name}': expected finite values, found nan"):
        open_checkpoint(folder, check="finite")
