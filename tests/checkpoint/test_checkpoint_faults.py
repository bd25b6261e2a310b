"""Damaged, contradictory and foreign checkpoints: each is refused with a message that says why."""

import json

import numpy as np
import pytest
from helpers.checkpoint_files import (
    join_safetensors,
    mini_tensors,
    safetensors_header,
    write_mini,
    write_sharded,
)
from helpers.pth_files import call, pth

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
LAST = "lm_head.weight"
PAYLOAD = b"".join(array.tobytes() for array in mini_tensors().values())
HEADER = safetensors_header(mini_tensors())
GOOD = join_safetensors(HEADER, PAYLOAD)
RAW = json.dumps(HEADER).encode()
NORM_TWICE = RAW[:-1] + b", " + json.dumps({NORM: HEADER[NORM]}).encode()[1:]


def with_header(change):
    """The good file with its header changed in place."""
    header = json.loads(json.dumps(HEADER))
    change(header)
    return join_safetensors(header, PAYLOAD)


def with_entry(name, **fields):
    """The good file with fields of one tensor's entry replaced; ... removes one."""

    def change(header):
        header[name] |= fields
        header[name] = {k: v for k, v in header[name].items() if v is not ...}

    return with_header(change)


def with_raw_header(raw):
    return join_safetensors(raw, PAYLOAD)


def moved(name, by):
    begin, end = HEADER[name]["data_offsets"]
    return with_entry(name, data_offsets=[begin + by, end + by])


BAD_FILES = {
    "empty": (b"", "found an empty file"),
    "7 bytes": (b"1234567", "8 bytes of header length, found a file of 7 bytes; it is truncated"),
    "only a length": (bytes(8), "expected JSON"),
    "length 2**63": ((2**63).to_bytes(8, "little") + GOOD[8:], "at most 16777216 bytes, found 9"),
    "length over the cap": ((100_000_001).to_bytes(8, "little") + GOOD[8:], "header of at most"),
    "length past the end": ((10**6).to_bytes(8, "little") + GOOD[8:], "the file is truncated"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "header of at most|truncated|JSON"),
    "not JSON": (with_raw_header(b"{'a': 1}"), "expected JSON"),
    "not UTF-8": (with_raw_header(b'{"\xff": 1}'), "expected JSON in UTF-8"),
    "JSON array": (with_raw_header(b"[]"), "expected a JSON object, found list"),
    "JSON null": (with_raw_header(b"null"), "expected a JSON object, found NoneType"),
    "nested": (with_raw_header(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested too deep"),
    "huge integer": (with_raw_header(b'{"a":' + b"9" * 10**5 + b"}"), "expected JSON"),
    "no tensors": (with_raw_header(b"{}"), "bytes at the end belong to no tensor"),
    "tensor twice": (with_raw_header(NORM_TWICE), f"every name once, found '{NORM}' twice"),
    "key twice": (
        with_raw_header(RAW.replace(b'"shape', b'"dtype": 1, "shape', 1)),
        "every name once, found 'dtype' twice",
    ),
    "metadata list": (with_header(lambda h: h.update(__metadata__=[])), "object of strings"),
    "metadata number": (with_header(lambda h: h.update(__metadata__={"a": 1})), "of strings"),
    "entry null": (with_header(lambda h: h.update({NORM: None})), f"{NORM}.*expected an object of"),
    "entry list": (with_header(lambda h: h.update({NORM: [1]})), f"{NORM}.*expected an object of"),
    "no dtype": (with_entry(NORM, dtype=...), f"{NORM}.*object of dtype, shape and data_offsets"),
    "no shape": (with_entry(NORM, shape=...), "object of dtype, shape"),
    "no offsets": (with_entry(NORM, data_offsets=...), "object of dtype, shape"),
    "extra field": (with_entry(NORM, stride=[1]), "object of dtype, shape"),
    "dtype unknown": (with_entry(NORM, dtype="F128"), f"{NORM}.*dtype: expected one of .*'F128'"),
    "dtype number": (with_entry(NORM, dtype=32), "dtype: expected one of .*found 32"),
    "dtype list": (with_entry(NORM, dtype=["F32"]), "dtype: expected one of"),
    "dtype of another size": (with_entry(NORM, dtype="F16"), "expected 16 bytes for F16"),
    "dtype of integers": (with_entry(NORM, dtype="I32"), f"{NORM}.*F32, F16, BF16, found I32"),
    "shape string": (with_entry(NORM, shape="8"), f"{NORM}.*shape: expected"),
    "shape negative": (with_entry(NORM, shape=[-2, -4]), "shape: expected"),
    "shape float": (with_entry(NORM, shape=[8.0]), "shape: expected"),
    "shape bool": (with_entry(NORM, shape=[True]), "shape: expected"),
    "shape of 9 axes": (with_entry(NORM, shape=[8] + [1] * 8), "shape: expected at most 8"),
    "shape of 2**60": (with_entry(NORM, shape=[2**60, 0]), "shape: expected"),
    "shape too large": (with_entry(NORM, shape=[9]), "expected 36 bytes for F32.*found 32"),
    "shape wraps at 2**64": (with_entry(NORM, shape=[2**32, 2**30]), "bytes for F32"),
    "shape scalar": (with_entry(NORM, shape=[]), "expected 4 bytes"),
    "offsets reversed": (with_entry(NORM, data_offsets=[32, 0]), "data_offsets: expected two"),
    "offsets negative": (with_entry(NORM, data_offsets=[-32, 0]), "data_offsets: expected two"),
    "three offsets": (with_entry(NORM, data_offsets=[0, 8, 32]), "data_offsets: expected two"),
    "offsets null": (with_entry(NORM, data_offsets=None), "data_offsets: expected two"),
    "misaligned": (moved(Q_PROJ, 2), "leaves a hole after|overlaps"),
    "overlap": (moved(Q_PROJ, -4), f"{Q_PROJ}.*begin at .*overlaps"),
    "same bytes twice": (
        with_header(lambda h: h.update(twin=h[NORM])),
        "expected its bytes to begin at .* it overlaps",
    ),
    "hole": (moved(LAST, 4), f"{LAST}.*leaves a hole after '{NORM}'"),
    "hole at the start": (moved(EMBEDDING, 4), "leaves a hole after|overlaps"),
    "past the end": (moved(LAST, 10**9), "leaves a hole"),
    "truncated by a byte": (GOOD[:-1], "the file is truncated"),
    "truncated in the middle": (GOOD[: len(GOOD) // 2], "truncated"),
    "trailing byte": (GOOD + b"\0", "bytes at the end belong to no tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_safetensors(name, tmp_path):
    content, message = BAD_FILES[name]
    (write_mini(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def without(name):
    return {key: array for key, array in mini_tensors().items() if key != name}


def replaced(name, array):
    return mini_tensors() | {name: array}


def floats(*shape):
    return np.ones(shape, np.float32)


BAD_TENSORS = {
    "no norm": (without(NORM), f"{NORM}.*expected 12 tensors, found none of that name"),
    "no embedding": (without(EMBEDDING), EMBEDDING),
    "no head": (without(LAST), LAST),
    "no layer": (
        {name: array for name, array in mini_tensors().items() if "layers" not in name},
        "input_layernorm.*9 are missing: also 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "no prefix": ({k.removeprefix("model."): v for k, v in mini_tensors().items()}, "none of that"),
    "a layer too many": (
        replaced("model.layers.1.input_layernorm.weight", floats(8)),
        "model.layers.1.input_layernorm.weight.*a Llama of 1 layers, found this one",
    ),
    "a bias": (
        replaced("model.layers.0.self_attn.q_proj.bias", floats(8)),
        r"q_proj.bias.*expected only the tensors of a Llama",
    ),
    "an adapter": (replaced("lora_A.weight", floats(8, 8)), "lora_A.weight"),
    "transposed": (replaced(LAST, floats(8, 10)), rf"{LAST}.*shape \(10, 8\), found \(8, 10\)"),
    "another vocabulary": (replaced(EMBEDDING, floats(12, 8)), r"shape \(10, 8\), found \(12, 8\)"),
    "a short norm": (replaced(NORM, floats(7)), r"shape \(8,\), found \(7,\)"),
    "a norm of two axes": (replaced(NORM, floats(1, 8)), r"shape \(8,\), found \(1, 8\)"),
    "a flat projection": (replaced(Q_PROJ, floats(64)), r"shape \(8, 8\), found \(64,\)"),
    "an empty projection": (replaced(Q_PROJ, floats(0, 8)), r"shape \(8, 8\), found \(0, 8\)"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name, tmp_path):
    tensors, message = BAD_TENSORS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write_mini(tmp_path, tensors))
    assert str(tmp_path) in str(caught.value)


def keep_only(*files):
    def change(folder):
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()

    return change


def instead(file, content):
    """Replaces the weights by another file."""

    def change(folder):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / file).write_bytes(content)

    return change


def overwritten(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def as_folder(file):
    def change(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


BAD_FOLDERS = {
    "empty": (keep_only(), "config.json and model.safetensors, found an empty directory"),
    "no config": (keep_only("model.safetensors"), "expected config.json"),
    "no weights": (keep_only("config.json"), "expected model.safetensors or .*index.json, found"),
    "pickles": (instead("pytorch_model.bin", b"x"), "pytorch_model.bin: expected a zip archive"),
    "pickle shards": (
        instead("pytorch_model-00001-of-00002.bin", b""),
        "shards need their pytorch_model.bin.index.json",
    ),
    "a pickle that calls": (
        instead("pytorch_model.bin", pth(call("os", "system", "true"))),
        "pytorch_model.bin: .*'os.system', which no tensors need; nothing was run",
    ),
    "Meta's layout": (instead("consolidated.00.pth", b""), "found config.json, consolidated"),
    "shards alone": (instead("model-00001-of-00002.safetensors", b""), "shards need their"),
    "an empty GGUF file": (instead("model.gguf", b""), "model.gguf: expected a checkpoint, found"),
    "several GGUF files": (
        lambda folder: [instead(f, b"")(folder) for f in ("a.gguf", "b.gguf")],
        "expected one GGUF model, found a.gguf, b.gguf; give one of these files",
    ),
    "config not JSON": (overwritten("config.json", b"{"), "config.json: expected JSON"),
    "config empty": (overwritten("config.json", b""), "config.json: expected JSON"),
    "config list": (overwritten("config.json", b"[]"), "config.json: expected a JSON object"),
    "config key twice": (
        overwritten("config.json", b'{"vocab_size": 1, "vocab_size": 2}'),
        "config.json: expected every name once, found 'vocab_size' twice",
    ),
    "config a folder": (as_folder("config.json"), "config.json: expected a JSON file"),
    "weights a folder": (
        as_folder("model.safetensors"),
        "expected a regular file, found a directory",
    ),
    "generation config not JSON": (
        overwritten("generation_config.json", b"?"),
        "generation_config.json: expected JSON",
    ),
    "generation config eos": (
        overwritten("generation_config.json", b'{"eos_token_id": "2"}'),
        "generation_config.json: eos_token_id: expected a token id",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name, tmp_path):
    change, message = BAD_FOLDERS[name]
    change(write_mini(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


HALF = dict(list(mini_tensors().items())[:6])
REST = dict(list(mini_tensors().items())[6:])
SHARDS = {"a.safetensors": HALF, "b.safetensors": REST}
WEIGHT_MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}
INDEX = "model.safetensors.index.json"


BAD_MAPS = {
    "absent": (None, "weight_map: expected an object"),
    "a list": (["a.safetensors"], "weight_map: expected an object"),
    "empty": ({}, "weight_map: expected an object"),
    "a number": (WEIGHT_MAP | {NORM: 1}, f"{NORM}.*name of a .safetensors file .* found 1"),
    "a parent": (WEIGHT_MAP | {NORM: "../a.safetensors"}, f"{NORM}.*beside the index"),
    "an absolute path": (WEIGHT_MAP | {NORM: "/a.safetensors"}, "beside the index"),
    "a pickle": (WEIGHT_MAP | {NORM: "a.bin"}, "beside the index"),
    "a NUL": (WEIGHT_MAP | {NORM: "a\0.safetensors"}, "beside the index"),
    "a missing shard": (
        WEIGHT_MAP | {NORM: "c.safetensors"},
        "c.safetensors: expected a regular file",
    ),
    "the other shard": (
        WEIGHT_MAP | {NORM: "a.safetensors"},
        f"{NORM}.*expected it in a.safetensors, found it in b.safetensors",
    ),
    "a tensor of no shard": (WEIGHT_MAP | {"x": "a.safetensors"}, "'x'.*found it in no shard"),
    "a tensor left out": (
        {k: v for k, v in WEIGHT_MAP.items() if k != NORM},
        f"{NORM}.*expected only tensors of the index in b.safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_index(name, tmp_path):
    weight_map, message = BAD_MAPS[name]
    write_sharded(tmp_path, SHARDS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (INDEX, b"{", "index.json: expected JSON"),
        (INDEX, b"{}", "weight_map: expected an object of tensor names"),
        (INDEX, b'{"weight_map": {"a": "b", "a": "c"}}', "every name once, found 'a' twice"),
        ("a.safetensors", b"", "a.safetensors: expected a checkpoint, found an empty file"),
        ("b.safetensors", GOOD[:-8], "b.safetensors.*truncated"),
        ("b.safetensors", GOOD, "expected it in one shard, found it in a.safetensors as well"),
    ],
)
def test_bad_shards(file, content, message, tmp_path):
    (write_sharded(tmp_path, SHARDS) / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "INDEX"])
def test_json_that_would_fill_the_memory(tmp_path, file):
    folder = write_mini(tmp_path / "m")
    if file == "INDEX":
        (folder / "model.safetensors").unlink()
        file = "model.safetensors.index.json"
    with open(folder / file, "wb") as big:
        big.truncate(2**24 + 1)
    with pytest.raises(CheckpointError, match=f"{file}: expected a JSON file of at most 16777216"):
        open_checkpoint(folder)
