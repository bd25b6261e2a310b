"""Randomly changed files: each opens or is a CheckpointError that names the file, never else."""

import json
import shutil
import tempfile
from pathlib import Path

from helpers.checkpoint_files import (
    MINI_CONFIG,
    TINY,
    gguf_bytes,
    mini_gguf,
    mini_tensors,
    safetensors_bytes,
    write_mini,
)
from helpers.pth_files import saved
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.errors import CheckpointError


def open_mutated(file, content):
    """Opens a checkpoint with one file replaced: it opens, or says why not, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_mini(Path(folder)) / file
        path.write_bytes(content)
        assert_opens_or_says_why(folder, path if path.suffix == ".gguf" else folder)


def assert_opens_or_says_why(folder, path=None):
    message = folder
    try:
        open_checkpoint(path or folder)
    except CheckpointError as error:
        message = str(error)
    assert folder in message


REFERENCE = TINY.parent / "reference"
GOOD = safetensors_bytes(mini_tensors())
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
CONFIG = json.dumps(MINI_CONFIG).encode()
GGUF = gguf_bytes(*mini_gguf())
GGUF_HEADER_END = len(GGUF) - sum(len(raw) + -len(raw) % 32 for *_, raw in mini_gguf()[1].values())


def mutations(length):
    """Up to 8 bytes overwritten below `length`, as (place, value)."""
    return st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), max_size=8)


def mutate(content, changes):
    mutated = bytearray(content)
    for place, value in changes:
        mutated[place] = value
    return bytes(mutated)


@settings(max_examples=300)
@given(mutations(HEADER_END), st.integers(0, 64))
@example([], 0)
@example([(0, 255), (7, 255)], 0)
def test_mutated_safetensors(changes, cut):
    open_mutated("model.safetensors", mutate(GOOD, changes)[: len(GOOD) - cut])


@settings(max_examples=200)
@given(mutations(len(CONFIG)))
def test_mutated_config(changes):
    open_mutated("config.json", mutate(CONFIG, changes))


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    ),
    st.sampled_from([*MINI_CONFIG, "rope_scaling", "rope_parameters", "eos_token_id"]),
)
def test_any_value_in_the_config(value, key):
    open_mutated("config.json", json.dumps(MINI_CONFIG | {key: value}).encode())


@settings(max_examples=400)
@given(mutations(GGUF_HEADER_END), st.integers(0, 64))
def test_mutated_gguf(changes, cut):
    open_mutated("model.gguf", mutate(GGUF, changes)[: len(GGUF) - cut])


BIN = saved(mini_tensors())
PLACES = st.integers(0, len(BIN) - 1)
PACKED = {
    name: (REFERENCE / name / "model.safetensors").read_bytes() for name in ("awq", "gptq_desc_act")
}
PACKED_HEADER = 8 + max(int.from_bytes(raw[:8], "little") for raw in PACKED.values())


@settings(max_examples=300)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8), st.integers(0, 64))
@example([], 0)
def test_mutated_pickles(changes, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = write_mini(Path(folder)).joinpath("pytorch_model.bin")
        (Path(folder) / "model.safetensors").unlink()
        path.write_bytes(mutate(BIN, changes)[: len(BIN) - cut])
        assert_opens_or_says_why(folder)


@settings(max_examples=200)
@given(st.sampled_from(list(PACKED)), mutations(PACKED_HEADER))
def test_mutated_packed_weights(name, changes):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(REFERENCE / name / "config.json", folder)
        (Path(folder) / "model.safetensors").write_bytes(mutate(PACKED[name], changes))
        assert_opens_or_says_why(folder)


@settings(max_examples=200)
@given(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([4]),
    st.sampled_from(["bits", "group_size", "sym", "desc_act", "version", "checkpoint_format"]),
    st.sampled_from(list(PACKED)),
)
def test_any_value_in_the_section_of_packed_weights(value, key, name):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(REFERENCE / name / "model.safetensors", folder)
        values = json.loads((REFERENCE / name / "config.json").read_text())
        values["quantization_config"][key] = value
        (Path(folder) / "config.json").write_text(json.dumps(values))
        assert_opens_or_says_why(folder)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    ),
    st.sampled_from(["temperature", "top_k", "eos_token_id", "bad_words_ids", "stop_strings"]),
)
def test_any_value_in_the_generation_config(value, key):
    open_mutated("generation_config.json", json.dumps({key: value}).encode())
