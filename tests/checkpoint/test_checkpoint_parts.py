"""Models in several files, and in files that torch.save wrote."""

import json
import struct

import numpy as np
import pytest
from helpers.checkpoint_files import (
    TINY,
    gguf_bytes,
    mini_gguf,
    mini_tensors,
    write_mini,
)
from helpers.pth_files import call, name_of, number, numbers, pickled, pth, saved, storage, tensor

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.gguf_parts import read_gguf_parts
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.tensor_names import named_weights
from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer import load_tokenizer
from codellama_rt.tools.convert.convert import convert

# GGUF in parts


def uint16(value):
    return struct.pack("<IH", 2, value)


def part_of(number, count, tensors, metadata=None, **changes):
    keys = {"split.no": uint16(number), "split.count": uint16(count)}
    keys["split.tensors.count"] = struct.pack("<Ii", 5, 12)
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    keys = {key: value for key, value in keys.items() if value is not ...}
    return gguf_bytes((metadata or {}) | keys, tensors)


def write_parts(folder, count=3, changes=None, missing=()):
    """The mini model in parts; `changes` are of the metadata, by the number of the part."""
    metadata, tensors = mini_gguf()
    names = list(tensors)
    for i in range(count):
        mine = {name: tensors[name] for name in names[i::count]}
        its = (changes or {}).get(i, {})
        mine |= its.pop("tensors", {})
        raw = part_of(i, count, mine, metadata if i == 0 else None, **its)
        if i not in missing:
            (folder / f"mini-{i + 1:05}-of-{count:05}.gguf").write_bytes(raw)
    return folder


def assert_same_weights(found, expected):
    theirs = named_weights(expected.config, expected.weights)
    assert found.config == expected.config
    for name, weight in named_weights(found.config, found.weights).items():
        assert (weight == theirs[name]).all(), name


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("given", ["folder", "first", "last"])
def test_a_model_in_parts_is_that_of_one_file(tmp_path, count, given):
    (tmp_path / "whole").write_bytes(gguf_bytes(*mini_gguf()))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_parts(folder, count)
    number = {"first": 1, "last": count}.get(given)
    path = folder if number is None else folder / f"mini-{number:05}-of-{count:05}.gguf"
    checkpoint = open_checkpoint(path)
    assert_same_weights(checkpoint, open_checkpoint(tmp_path / "whole"))
    assert checkpoint.path == folder / f"mini-00001-of-{count:05}.gguf"
    assert checkpoint.mapped_bytes == checkpoint.stored_bytes


BAD_PARTS = {
    "a part that is missing": ({"missing": [1]}, "mini-00002-of-00003.gguf: expected a regular"),
    "the first part missing": ({"missing": [0]}, "mini-00001-of-00003.gguf: expected a regular"),
    "two parts of one number": ({"changes": {1: {"split__no": uint16(2)}}}, "split.no: expected 1"),
    "no number": ({"changes": {2: {"split__no": ...}}}, "split.no: expected 2, found 'nothing'"),
    "parts of two models": (
        {"changes": {1: {"split__count": uint16(4)}}},
        "split.count: expected 3",
    ),
    "no count": ({"changes": {1: {"split__count": ...}}}, "split.count: expected 3"),
    "a negative count": (
        {"changes": {1: {"split__count": struct.pack("<Ii", 5, -3)}}},
        "split.count: expected an int",
    ),
    "text for a number": ({"changes": {1: {"split__no": "1"}}}, "split.no: expected an integer"),
    "a number that is too large": (
        {"changes": {1: {"split__no": 2**31}}},
        "split.no: expected an integer",
    ),
    "a tensor twice": (
        {"changes": {1: {"tensors": {"token_embd.weight": mini_gguf()[1]["token_embd.weight"]}}}},
        "'token_embd.weight': expected it in one part, found it in mini-00001-of-00003.gguf as",
    ),
    "a tensor too many": (
        {"changes": {1: {"tensors": {"x.weight": ("F32", (1,), bytes(4))}}}},
        "split.tensors.count: expected 13, as many as the parts have, found 12",
    ),
    "tensors that are missing": (
        {"changes": {0: {"split__tensors__count": 40}}},
        "split.tensors.count: expected 12",
    ),
    "text for the tensors": (
        {"changes": {0: {"split__tensors__count": "12"}}},
        "split.tensors.count: expected an integer",
    ),
    "a count of 0 beside parts": (
        {"changes": {0: {"split__count": 0}}},
        "expected 12 tensors|found",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_parts(tmp_path, name):
    options, message = BAD_PARTS[name]
    options = {
        "changes": {i: dict(its) for i, its in options.get("changes", {}).items()},
        "missing": options.get("missing", ()),
    }
    write_parts(tmp_path, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / f"mini-0000{3 if options['missing'] else 1}-of-00003.gguf")
    assert str(tmp_path) in str(caught.value)


DAMAGED = {
    "cut in the header": lambda raw: raw[:40],
    "cut in the tensors": lambda raw: raw[:-32],
    "empty": lambda raw: b"",
    "not GGUF": lambda raw: b"GGML" + raw[4:],
    "another version": lambda raw: raw[:4] + b"\4" + raw[5:],
    "a folder": None,
    "itself as a link": "link",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_part(tmp_path, name):
    write_parts(tmp_path)
    path = tmp_path / "mini-00002-of-00003.gguf"
    raw = path.read_bytes()
    path.unlink()
    if DAMAGED[name] is None:
        path.mkdir()
    elif DAMAGED[name] == "link":
        path.symlink_to("mini-00001-of-00003.gguf")
    else:
        path.write_bytes(DAMAGED[name](raw))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "mini-00001-of-00003.gguf")
    assert str(path) in str(caught.value)


def test_a_directory_with_a_gguf_file_gives_its_tokenizer_too(tmp_path):
    from helpers.tokenizer_files import gguf_file, sentencepiece_fields

    file = gguf_file(tmp_path, sentencepiece_fields())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as uploads have it
    assert load_tokenizer(tmp_path).pieces == load_tokenizer(file).pieces


def test_other_layouts_come_before_a_gguf_file(tmp_path):
    folder = write_mini(tmp_path / "m")
    (folder / "m.gguf").write_bytes(b"not read")
    assert open_checkpoint(folder).path == folder


def test_a_projector_of_images_is_no_second_model(tmp_path):
    write_parts(tmp_path, 1)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"not read")
    assert open_checkpoint(tmp_path).config.n_layers == 1


def test_parts_are_read_in_their_order(tmp_path):
    write_parts(tmp_path)
    tensors = read_gguf_parts(tmp_path / "mini-00003-of-00003.gguf").tensors
    files = [tensor.file.name for tensor in tensors.values()]
    assert files == sorted(files)


# What torch.save wrote


def as_bin(folder, tensors=None, **options):
    write_mini(folder)
    (folder / "model.safetensors").unlink()
    tensors = mini_tensors() if tensors is None else tensors
    (folder / "pytorch_model.bin").write_bytes(saved(tensors, **options))
    return folder


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_pytorch_model_bin(tmp_path, parameters, dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensors = {name: array.astype(kind) for name, array in mini_tensors().items()}
    found = open_checkpoint(as_bin(tmp_path / "bin", tensors, parameters=parameters))
    assert_same_weights(found, open_checkpoint(write_mini(tmp_path / "safe", tensors)))


def test_tables_beside_the_weights(tmp_path):
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.cos_cached": np.ones((4, 2), np.float64),
    }
    open_checkpoint(as_bin(tmp_path / "a", tables | mini_tensors()))
    for array in (np.arange(4), np.zeros(3, np.uint8), np.ones(2, bool), np.zeros(2, np.int32)):
        folder = as_bin(tmp_path / f"b{array.dtype}", mini_tensors() | {"x": array})
        with pytest.raises(CheckpointError, match="'x': expected only the tensors"):
            open_checkpoint(folder)
        folder = as_bin(tmp_path / f"c{array.dtype}", mini_tensors() | {"model.norm.weight": array})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            open_checkpoint(folder)


def write_bin_shards(folder, weight_map=None):
    as_bin(folder).joinpath("pytorch_model.bin").unlink()
    tensors = list(mini_tensors().items())
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(tensors[i::2]) for i in range(2)}
    for file, some in files.items():
        (folder / file).write_bytes(saved(some))
    if weight_map is None:
        weight_map = {name: file for file, some in files.items() for name in some}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_that_torch_saved(tmp_path):
    found = open_checkpoint(write_bin_shards(tmp_path / "bin"))
    assert_same_weights(found, open_checkpoint(write_mini(tmp_path / "safe")))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "../x.bin", "/x.bin", "x.pt", "missing.bin", 7, None, "a\0.bin"]
)
def test_indexes_that_name_another_file(tmp_path, file):
    folder = write_bin_shards(tmp_path / "a", dict.fromkeys(mini_tensors(), file))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_safetensors_come_before_pickles(tmp_path):
    folder = write_mini(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    open_checkpoint(folder)


PARAMETER = name_of("torch._utils", "_rebuild_parameter")
HOOKS = name_of("collections", "OrderedDict") + b")R"
HOSTILE_BINS = {
    "a call": pth(call("os", "system", "touch canary")),
    "a call of builtins": pth(call("builtins", "exec", "raise SystemExit")),
    "a parameter of a number": pth(pickled(PARAMETER + b"(" + number(1) + b"\x88" + HOOKS + b"tR")),
    "a parameter of a name": pth(pickled(PARAMETER + b"(" + PARAMETER + b"\x88" + HOOKS + b"tR")),
    "a parameter without hooks": pth(pickled(PARAMETER + b"(" + tensor() + b"\x88tR")),
    "a parameter with hooks": pth(
        pickled(PARAMETER + b"(" + tensor() + b"\x88}X\1\0\0\0ah\0stR".replace(b"h\0", b"N"))
    ),
    "a parameter trained by a number": pth(
        pickled(PARAMETER + b"(" + tensor() + number(1) + HOOKS + b"tR")
    ),
    "a parameter of four": pth(
        pickled(PARAMETER + b"(" + tensor() + b"\x88" + HOOKS + HOOKS + b"tR")
    ),
    "a module": pth(pickled(name_of("torch.nn.modules.linear", "Linear") + b")\x81")),
    "a wrapped dictionary": pth(pickled(b"}")),
    "a storage of strings": pth(
        pickled(tensor(stored=storage(kind=name_of("torch", "StringStorage"))))
    ),
    "a long storage that is short": pth(
        pickled(tensor(stored=storage(kind=name_of("torch", "LongStorage"))))
    ),
    "a double storage that is short": pth(
        pickled(tensor(stored=storage(kind=name_of("torch", "DoubleStorage"))))
    ),
    "a tensor beyond its storage": pth(pickled(tensor(offset=number(1)))),
    "strides of a transposed tensor": pth(pickled(tensor(strides=numbers(1, 2)))),
    "a negative size": pth(pickled(tensor(shape=numbers(-2, -2)))),
    "no pickle": pth(b""),
    "a cut pickle": pth(pickled(tensor())[:-5]),
    "the format before 1.6": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "a tar archive": b"storages" + bytes(600),
    "nothing but zeros": bytes(4096),
    "safetensors under this name": b"\x02\0\0\0\0\0\0\0{}",
}


@pytest.mark.parametrize("name", HOSTILE_BINS)
@pytest.mark.parametrize("place", ["file", "shard"])
def test_hostile_pickles(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    if place == "file":
        folder = as_bin(tmp_path / "m")
        path = folder / "pytorch_model.bin"
    else:
        folder = write_bin_shards(tmp_path / "m")
        path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(HOSTILE_BINS[name])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_golden_models_in_pickles(tmp_path):
    name = "gqa_theta1e6_bf16"
    tensors = {k: t.view() for k, t in read_safetensors(TINY / name / "model.safetensors").items()}
    (tmp_path / "config.json").write_text((TINY / name / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(saved(tensors))
    assert_same_weights(open_checkpoint(tmp_path), open_checkpoint(TINY / name))


def test_pickles_are_converted_to_safetensors(tmp_path):
    convert(write_bin_shards(tmp_path / "bin"), tmp_path / "safe")
    found = open_checkpoint(tmp_path / "safe")
    assert_same_weights(found, open_checkpoint(write_mini(tmp_path / "plain")))
