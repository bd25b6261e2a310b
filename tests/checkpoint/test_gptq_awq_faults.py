"""AWQ and GPTQ directories that are damaged or say what is not so: each is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.errors import CheckpointError

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
K = "model.layers.0.self_attn.k_proj"  # (32, 64): 2 groups of 32


def changed(folder, name, *, tensors=None, section=None):
    """A copy of a reference model; a function changes its tensors, keys its quantization_config."""
    shutil.copytree(REFERENCE / name, folder)
    values = json.loads((folder / "config.json").read_text())
    found = values["quantization_config"] | (section or {})
    values["quantization_config"] = {k: v for k, v in found.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors")
    return folder


def instead(part, change):
    """Replaces a part of one projection by what a function makes of it; None removes it."""

    def apply(stored):
        array = stored.pop(f"{K}.{part}")
        made = change(array)
        if made is not None:
            stored[f"{K}.{part}"] = np.ascontiguousarray(made)

    return apply


def removed(array):
    return None


BAD_TENSORS = {
    "no zero points": (instead("qzeros", removed), "k_proj.qzeros': expected it, found none"),
    "no scales": (instead("scales", removed), "k_proj.scales': expected it, found none"),
    "no integers": (instead("qweight", removed), "k_proj.weight': expected .* none of that name"),
    "integers of 64 bits": (instead("qweight", lambda a: a.astype(np.int64)), "expected I32"),
    "integers of 8 bits": (instead("qweight", lambda a: a.astype(np.int8)), "expected I32"),
    "floats for integers": (instead("qweight", lambda a: a.astype(np.float32)), "expected I32"),
    "transposed integers": (instead("qweight", lambda a: a.T), r"expected I32 \(\d+, \d+\)"),
    "integers too few": (instead("qweight", lambda a: a[:, :-1]), r"expected I32 \(\d+, \d+\)"),
    "no row of integers": (instead("qweight", lambda a: a[:0]), "expected"),
    "one axis": (instead("qweight", lambda a: a.reshape(-1)), "expected"),
    "no axis": (instead("qweight", lambda a: a[0, 0].reshape(())), "expected"),
    "three axes": (instead("qweight", lambda a: a[None]), "expected"),
    "zero points of 8 bits": (instead("qzeros", lambda a: a.astype(np.uint8)), "expected I32"),
    "zero points too few": (instead("qzeros", lambda a: a[:1]), r"qzeros': expected I32 \(2, 4\)"),
    "zero points too wide": (
        instead("qzeros", lambda a: np.hstack([a, a])),
        r"qzeros': expected I32 \(2, 4\), found I32 \(2, 8\)",
    ),
    "integers for scales": (instead("scales", lambda a: a.astype(np.int32)), "expected floats"),
    "scales of one axis": (
        instead("scales", lambda a: a.reshape(-1)),
        r"expected floats \(groups,",
    ),
    "no scale": (instead("scales", lambda a: a[:0]), r"expected floats \(groups, out\)"),
    "scales of half the groups": (instead("scales", lambda a: a[:1]), "expected (I32|2 groups)"),
    "scales of half the rows": (instead("scales", lambda a: a[:, ::2]), "expected I32"),
    "rows that are no eights": (instead("scales", lambda a: a[:, :-1]), "expected I32"),
}
BAD_ORDERS = {
    "a group too many": (lambda a: a + 1, "expected groups from 0 to 1, found 1 to 2"),
    "a negative group": (lambda a: a - 1, "expected groups from 0 to 1, found -1 to 0"),
    "groups of 64 bits": (lambda a: a.astype(np.int64), r"expected I32 \(64,\)"),
    "groups too few": (lambda a: a[:-1], r"expected I32 \(64,\), found I32 \(63,\)"),
    "no group": (lambda a: a[:0], r"expected I32 \(64,\)"),
    "groups as floats": (lambda a: a.astype(np.float32), r"expected I32 \(64,\)"),
}
BAD_SECTIONS = {
    "8 bits": ({"bits": 8}, "quantization_config: bits: expected 4, found 8"),
    "no bits": ({"bits": ...}, "quantization_config: bits: expected an integer"),
    "bits as text": ({"bits": "4"}, "quantization_config: bits: expected an integer"),
    "groups of 0": ({"group_size": 0}, "group_size: expected -1 or a positive integer"),
    "groups of -2": ({"group_size": -2}, "group_size: expected an integer from -1"),
    "groups of 2^40": ({"group_size": 2**40}, "group_size: expected an integer from -1"),
    "no groups": ({"group_size": None}, "group_size: expected an integer from -1"),
    "other groups": ({"group_size": 64}, r"expected 2 groups of 64 inputs each, of 96"),
    "another method": ({"quant_method": "aqlm"}, "quantization_config: expected nothing"),
    "a method as a list": ({"quant_method": ["awq"]}, "quantization_config: expected nothing"),
}


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(tmp_path, method, name):
    change, message = BAD_TENSORS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(changed(tmp_path / "m", method, tensors=change))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_bad_orders_of_inputs(tmp_path, name):
    change, message = BAD_ORDERS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(changed(tmp_path / "m", "gptq", tensors=instead("g_idx", change)))
    assert "k_proj.g_idx" in str(caught.value)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("name", BAD_SECTIONS)
def test_bad_sections(tmp_path, method, name):
    section, message = BAD_SECTIONS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(changed(tmp_path / "m", method, section=section))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("method", "section", "message"),
    [
        ("awq", {"version": "gemv"}, "version: expected 'gemm', found 'gemv'"),
        ("awq", {"version": 2}, "version: expected 'gemm', found 2"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: expected 'gptq' or"),
        ("gptq", {"checkpoint_format": ["gptq"]}, "checkpoint_format: expected 'gptq' or"),
        ("gptq", {"sym": "yes"}, "sym: expected true or false"),
        ("gptq", {"sym": True}, "qzeros': expected zero points of 8, as sym says .*, found"),
        ("gptq_sym", {"checkpoint_format": "gptq_v2"}, "expected zero points of 8, .*, found 7"),
    ],
)
def test_layouts_that_are_not_so(tmp_path, method, section, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(changed(tmp_path / "m", method, section=section))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_scales_that_are_too_large(tmp_path, method):
    large = instead("scales", lambda a: np.full_like(a, 65000.0))
    folder = changed(tmp_path / "m", method, tensors=large)
    with pytest.raises(CheckpointError, match="scales with which all weights are in the range"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, dtype="float32").weights.layers[0].k_proj.max() > 65504


@pytest.mark.parametrize("method", ["awq", "gptq", "gptq_sym", "gptq_desc_act"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite(tmp_path, method, value):
    bad = instead("scales", lambda a: np.full_like(a, value))
    folder = changed(tmp_path / "m", method, tensors=bad)
    open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight.*expected finite values"):
        open_checkpoint(folder, check="finite")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight.*expected finite values"):
        open_checkpoint(folder, quantization="int8")


def test_biases_of_zeros_are_left_out_and_others_are_not(tmp_path):
    """The first GPTQ programs wrote a bias for every projection."""
    stored = load_file(REFERENCE / "gptq" / "model.safetensors")
    assert not stored[f"{K}.bias"].any()
    bad = instead("bias", np.ones_like)
    with pytest.raises(CheckpointError, match=r"k_proj\.bias.*expected only the tensors"):
        open_checkpoint(changed(tmp_path / "m", "gptq", tensors=bad))


@pytest.mark.parametrize(
    ("name", "file", "section"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_a_file_of_its_own_says_how(tmp_path, name, file, section):
    """As AutoGPTQ and AutoAWQ wrote it before config.json had a section."""
    folder = shutil.copytree(REFERENCE / name, tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / file).write_text(json.dumps(section))
    found, expected = open_checkpoint(folder), open_checkpoint(REFERENCE / name)
    for mine, theirs in zip(found.weights.layers, expected.weights.layers, strict=True):
        assert (mine.k_proj.payload == theirs.k_proj.payload).all()
    (folder / file).write_text(json.dumps(section | {"bits": 3, "w_bit": 3}))
    with pytest.raises(CheckpointError, match="bits: expected 4, found 3"):
        open_checkpoint(folder)
    (folder / file).write_text("{")
    with pytest.raises(CheckpointError, match=f"{file}: expected JSON"):
        open_checkpoint(folder)


def test_biases_of_a_model_that_has_them_are_kept_even_of_zeros(tmp_path):
    stored = load_file(REFERENCE / "gptq" / "model.safetensors")
    folder = changed(tmp_path / "m", "gptq")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_bias": True}))
    biases = open_checkpoint(folder).weights.biases
    assert [sorted(its) for its in biases] == [["k_proj", "o_proj", "q_proj", "v_proj"]] * 2
    assert f"{K}.bias" in stored


@pytest.mark.parametrize("dtype", [np.float64, np.float32, "bfloat16"])
def test_scales_in_other_dtypes(tmp_path, dtype):
    """Kernels take float16; what it may not hold becomes floats."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    folder = changed(tmp_path / "m", "awq", tensors=instead("scales", lambda a: a.astype(kind)))
    found = open_checkpoint(folder)
    plain = open_checkpoint(REFERENCE / "awq", dtype="float32").weights.layers[0].k_proj
    scale = 2**-7 if dtype == "bfloat16" else 1e-7
    weight = found.weights.layers[0].k_proj.astype(np.float32)
    assert np.abs(weight - plain).max() <= scale * np.abs(plain).max() + 1e-3 * np.abs(plain).max()
