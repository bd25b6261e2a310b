import json
import mmap
import os
import random

import ml_dtypes
import numpy as np
import pytest
from helpers.checkpoint_files import (
    MINI_CONFIG,
    TINY,
    TINY_NAMES,
    join_safetensors,
    mini_tensors,
    safetensors_bytes,
    safetensors_header,
    write_mini,
    write_sharded,
)
from helpers.quantized_models import mapping_under

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.finiteness import first_non_finite
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.errors import CheckpointError, CheckpointWarning
from codellama_rt.ops.dtypes import numpy_dtype

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def all_arrays(weights):
    yield from (weights.embedding, weights.norm, weights.lm_head)
    for layer in weights.layers:
        yield from vars(layer).values()


@pytest.mark.parametrize("name", TINY_NAMES)
def test_weights_are_views_of_one_mapping_a_file(name):
    checkpoint = open_checkpoint(TINY / name)
    arrays = list(all_arrays(checkpoint.weights))
    mappings = {id(mapping_under(array)) for array in arrays}
    assert all(isinstance(mapping_under(array), mmap.mmap) for array in arrays)
    assert len(mappings) == len(list((TINY / name).glob("*.safetensors")))
    assert all(array.dtype.name == checkpoint.config.dtype for array in arrays)
    assert not any(array.flags.writeable for array in arrays)
    assert checkpoint.path == checkpoint.tokenizer_path == TINY / name


def test_weights_equal_those_of_the_safetensors_package():
    reference = pytest.importorskip("safetensors.numpy")
    for name in TINY_NAMES:
        for file in (TINY / name).glob("*.safetensors"):
            ours = read_safetensors(file)
            for key, expected in reference.load_file(file).items():
                assert ours[key].view().tobytes() == expected.tobytes()


def test_every_weight_is_in_its_place(tmp_path):
    tensors = mini_tensors()
    weights = open_checkpoint(write_mini(tmp_path, tensors)).weights
    (layer,) = weights.layers
    prefix = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": weights.embedding,
        prefix + "input_layernorm.weight": layer.attention_norm,
        prefix + "self_attn.q_proj.weight": layer.q_proj,
        prefix + "self_attn.k_proj.weight": layer.k_proj,
        prefix + "self_attn.v_proj.weight": layer.v_proj,
        prefix + "self_attn.o_proj.weight": layer.o_proj,
        prefix + "post_attention_layernorm.weight": layer.mlp_norm,
        prefix + "mlp.gate_proj.weight": layer.gate_proj,
        prefix + "mlp.up_proj.weight": layer.up_proj,
        prefix + "mlp.down_proj.weight": layer.down_proj,
        NORM: weights.norm,
        "lm_head.weight": weights.lm_head,
    }
    assert expected.keys() == tensors.keys()
    for name, array in expected.items():
        assert np.array_equal(array, tensors[name]), name


def test_stored_bytes_and_generation_config(tmp_path):
    checkpoint = open_checkpoint(TINY / "mqa_fp16_sharded")
    index = json.loads((TINY / "mqa_fp16_sharded/model.safetensors.index.json").read_text())
    assert checkpoint.stored_bytes == index["metadata"]["total_size"]
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert open_checkpoint(write_mini(tmp_path)).generation_config == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "top_p": 0.9}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [2, 5], "top_p": 0.9}


def test_tied_embeddings_are_one_array(tmp_path):
    weights = open_checkpoint(TINY / "tied_fp32").weights
    assert weights.lm_head is weights.embedding
    # A head that is stored nevertheless is ignored, as in transformers.
    weights = open_checkpoint(write_mini(tmp_path, tie_word_embeddings=True)).weights
    assert weights.lm_head is weights.embedding


ROTARY_TABLES = [
    f"{module}.{table}"
    for module in ("model.layers.0.self_attn.rotary_emb", "model.rotary_emb")
    for table in ("inv_freq", "cos_cached", "sin_cached")
]


@pytest.mark.parametrize("table", ROTARY_TABLES)
@pytest.mark.parametrize("place", ["file", "shard and index", "shard", "index"])
def test_old_files_may_carry_rotary_tables(tmp_path, table, place):
    """They follow from the configuration; some are in the index or in a shard alone."""
    extra = {table: np.ones(2, np.float32)}
    if place == "file":
        open_checkpoint(write_mini(tmp_path, mini_tensors() | extra))
        return
    shard, weights = "model-00001-of-00001.safetensors", mini_tensors()
    weight_map = dict.fromkeys(weights, shard)
    if "index" in place:
        weight_map[table] = shard
    tensors = weights | extra if "shard" in place else weights
    open_checkpoint(write_sharded(tmp_path, {shard: tensors}, weight_map))


def test_the_head_of_a_tied_model_may_be_in_the_index_alone(tmp_path):
    shard, weights = "model-00001-of-00001.safetensors", mini_tensors()
    del weights["lm_head.weight"]
    weight_map = dict.fromkeys(mini_tensors(), shard)
    folder = write_sharded(tmp_path, {shard: weights}, weight_map)
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight': expected 12 tensors, found none"
    ):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(MINI_CONFIG | {"tie_word_embeddings": True}))
    open_checkpoint(folder)


def write_doubles(folder, change=lambda name, array: array, **config):
    """The mini model in float64."""
    wide = {n: change(n, a.astype(np.float64)) for n, a in mini_tensors().items()}
    return write_mini(folder, wide, **config)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_float64_is_rounded_to_what_is_computed_with(tmp_path, dtype):
    write_doubles(tmp_path / "wide", torch_dtype="float64")
    wide = open_checkpoint(tmp_path / "wide", dtype=dtype, check="finite")
    plain = open_checkpoint(write_mini(tmp_path / "plain"), dtype=dtype)
    assert wide.config == plain.config
    for name, weight in vars(wide.weights.layers[0]).items():
        assert (weight == getattr(plain.weights.layers[0], name)).all(), name
    assert (wide.weights.embedding == plain.weights.embedding).all()


def test_float64_is_quantised_as_float32_is(tmp_path):
    wide = open_checkpoint(write_doubles(tmp_path / "wide"), quantization="int8")
    plain = open_checkpoint(write_mini(tmp_path / "plain"), quantization="int8")
    for name in ("q_proj", "down_proj"):
        found, expected = (getattr(c.weights.layers[0], name).payload for c in (wide, plain))
        assert (found == expected).all()


def test_float64_beyond_the_range_of_float32(tmp_path):
    folder = write_doubles(tmp_path, lambda name, a: a * 1e300 if name == NORM else a)
    with pytest.raises(CheckpointError, match=f"{NORM}.*float64 in the range of float32"):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("none", [-1, 10, 32000, 2**32 - 1])
def test_ids_of_the_generation_config_that_mean_none(tmp_path, key, none):
    write_mini(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({key: none, "top_p": 0.9}))
    with pytest.warns(CheckpointWarning, match=f"generation_config.json: {key}: {none} is none"):
        assert open_checkpoint(tmp_path).generation_config == {"top_p": 0.9}
    file.write_text(json.dumps({key: [3, none]}))
    with pytest.warns(CheckpointWarning, match=f"generation_config.json: {key}: {none} is none"):
        assert open_checkpoint(tmp_path).generation_config == {key: [3]}


def test_a_single_file_is_preferred_to_an_index(tmp_path):
    write_mini(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("not read")
    open_checkpoint(tmp_path)


def test_zero_length_tensors_and_metadata_are_allowed(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "nothing": {}} | safetensors_header(mini_tensors())
    header["nothing"] = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    payload = b"".join(array.tobytes() for array in mini_tensors().values())
    file = tmp_path / "a.safetensors"
    file.write_bytes(join_safetensors(header, payload))
    assert read_safetensors(file)["nothing"].view().shape == (0, 3)


@pytest.mark.parametrize("padding", range(1, 8))
def test_unaligned_tensors_are_copied(tmp_path, padding):
    tensors = mini_tensors()
    raw = json.dumps(safetensors_header(tensors)).encode()
    raw += b" " * (-len(raw) % 8 + padding)
    payload = b"".join(array.tobytes() for array in tensors.values())
    (write_mini(tmp_path) / "model.safetensors").write_bytes(join_safetensors(raw, payload))
    weights = open_checkpoint(tmp_path).weights
    assert np.array_equal(weights.lm_head, tensors["lm_head.weight"])
    assert weights.lm_head.flags.aligned
    assert (mapping_under(weights.lm_head) is None) == (padding != 4)


def test_the_file_may_be_deleted_while_open(tmp_path):
    write_mini(tmp_path)
    weights = open_checkpoint(tmp_path).weights
    os.remove(tmp_path / "model.safetensors")
    assert np.array_equal(weights.norm, mini_tensors()[NORM])


@pytest.mark.parametrize("name", ["mha_theta1e4_fp32", "gqa_theta1e6_bf16", "mqa_fp16_sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion(name, dtype):
    stored = open_checkpoint(TINY / name)
    calls = []
    converted = open_checkpoint(TINY / name, dtype=dtype, progress=lambda *call: calls.append(call))
    assert converted.config.dtype == dtype
    for before, after in zip(
        all_arrays(stored.weights), all_arrays(converted.weights), strict=True
    ):
        assert after.dtype.name == dtype
        assert np.array_equal(before.astype(numpy_dtype(dtype)), after)
        assert not after.flags.writeable
    if dtype == stored.config.dtype:
        assert not calls
        assert mapping_under(converted.weights.norm) is not None
    else:
        done, totals, what = zip(*calls, strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == totals[-1] == stored.stored_bytes
        assert set(what) == {f"converting to {dtype}"}


def test_conversion_in_chunks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("codellama_rt.checkpoint.weight_loading._CHUNK_BYTES", 100)
    tensors = mini_tensors()
    weights = open_checkpoint(write_mini(tmp_path, tensors), dtype="bfloat16").weights
    expected = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    assert np.array_equal(weights.lm_head, expected)


def test_under_auto_the_projections_decide(tmp_path):
    tensors = {
        name: array.astype(ml_dtypes.bfloat16) if name.endswith("_proj.weight") else array
        for name, array in mini_tensors().items()
    }
    checkpoint = open_checkpoint(write_mini(tmp_path, tensors))
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.weights.embedding.dtype == ml_dtypes.bfloat16
    assert checkpoint.weights.lm_head.dtype == ml_dtypes.bfloat16
    assert checkpoint.weights.norm.dtype == np.float32
    assert mapping_under(checkpoint.weights.norm) is None  # vectors are copied beside what is made
    assert mapping_under(checkpoint.weights.layers[0].q_proj) is not None


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_overflow_in_conversion_names_the_tensor(tmp_path, dtype, value):
    tensors = mini_tensors()
    tensors[Q_PROJ][3, 5] = value
    write_mini(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*range of {dtype}.*at \[3, 5\]"):
        open_checkpoint(tmp_path, dtype=dtype)
    open_checkpoint(tmp_path, dtype="float32", check="finite")


def test_conversion_leaves_what_was_not_finite_to_the_check(tmp_path):
    tensors = mini_tensors()
    tensors[NORM][:2] = np.inf, np.nan
    converted = open_checkpoint(write_mini(tmp_path, tensors), dtype="float16").weights.norm
    assert np.isinf(converted[0])
    assert np.isnan(converted[1])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_check_finite_finds_one_bad_value(tmp_path, stored, value):
    tensors = mini_tensors()
    tensors[Q_PROJ][2, 1] = value
    tensors = {name: array.astype(stored) for name, array in tensors.items()}
    open_checkpoint(write_mini(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*finite.*(nan|inf) at \[2, 1\]"):
        open_checkpoint(tmp_path, check="finite")


def test_check_finite_reads_everything_and_reports_progress():
    calls = []
    checkpoint = open_checkpoint(
        TINY / "gqa_theta1e6_bf16", check="finite", progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (checkpoint.stored_bytes, checkpoint.stored_bytes, "checking for NaN")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_first_non_finite(dtype):
    array = np.linspace(-3e38, 3e38, 1000).clip(*[float(f(ml_dtypes.finfo(dtype))) for f in LIMITS])
    array = array.astype(dtype)
    assert first_non_finite(array) is None
    array[[500, 800]] = np.nan, np.inf
    assert first_non_finite(array) == 500
    assert first_non_finite(array[:0]) is None


LIMITS = (lambda info: info.min, lambda info: info.max)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
        ({"dtype": None}, "dtype must be one of"),
        ({"check": "nan"}, "check must be None or 'finite', got 'nan'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(TINY / "tied_fp32", **arguments)


def test_shards_in_any_order(tmp_path):
    tensors = mini_tensors()
    names = random.Random(0).sample(list(tensors), len(tensors))
    shards = {
        f"model-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)
    }
    weights = open_checkpoint(write_sharded(tmp_path, shards)).weights
    assert np.array_equal(weights.embedding, tensors["model.embed_tokens.weight"])


def test_a_header_of_many_tensors_is_quick_to_read(tmp_path):
    tensors = {f"t{i}": np.zeros(1, np.float32) for i in range(20_000)}
    file = tmp_path / "many.safetensors"
    file.write_bytes(safetensors_bytes(tensors))
    assert len(read_safetensors(file)) == 20_000
