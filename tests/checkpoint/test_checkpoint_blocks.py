"""GGUF's blocks used as they lie: views of the mapping, each tensor in its own type."""

import mmap

import numpy as np
import pytest
from helpers.quantized_models import (
    BLOCK_CONFIG,
    block_model,
    floats,
    mapping_under,
    projections,
    random_blocks,
    resident_bytes,
)

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.quantize import QUANTIZATIONS
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.ops.quantized import GGUF_BLOCKS, TILED, Quantized

KINDS = [name.upper() for name in GGUF_BLOCKS]
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output.": "Q6_K", "": "Q4_K"}  # as Q4_K_M mixes
PROMPT = np.random.default_rng(1).integers(3, 300, 40).tolist()


def logits(checkpoint):
    return sequence_logits(Llama(checkpoint.config, checkpoint.weights), PROMPT)


def assert_near(actual, expected, share):
    """The error, measured by the spread of the expected logits."""
    assert np.abs(actual - expected).mean() <= share * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_are_of_a_size_that_tells(kind):
    gguf = pytest.importorskip("gguf")
    raw = np.frombuffer(random_blocks(np.random.default_rng(0), kind, (64, 256)), np.uint8)
    values = gguf.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType[kind])
    assert values.shape == (64, 256)
    assert 0.02 < values.std() < 0.2
    assert abs(values.mean()) < 0.3 * values.std()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [*({"": kind} for kind in KINDS), MIXED], ids=str)
def test_blocks_are_views_and_mean_what_the_gguf_package_decodes(tmp_path, kinds, tied):
    path = block_model(tmp_path / "a.gguf", kinds, tied=tied)
    checkpoint = open_checkpoint(path, check="finite")
    for weight in [checkpoint.weights.embedding, *projections(checkpoint.weights)]:
        assert isinstance(weight, Quantized)
        assert isinstance(mapping_under(weight.payload), mmap.mmap)
    assert (checkpoint.weights.lm_head is checkpoint.weights.embedding) is tied
    layer = checkpoint.weights.layers[1]
    assert layer.q_proj.dtype == kinds.get("", "").lower()
    assert layer.v_proj.dtype == kinds.get("attn_v", kinds[""]).lower()
    assert checkpoint.mapped_bytes == checkpoint.stored_bytes
    assert checkpoint.config.dtype == "bfloat16"
    decoded = open_checkpoint(path, dtype="float32")
    assert not any(isinstance(weight, Quantized) for weight in projections(decoded.weights))
    assert_near(logits(checkpoint), logits(decoded), 0.02)


def test_a_type_that_no_operator_takes_is_decoded(tmp_path):
    """Beside those that are used as they lie."""
    gguf = pytest.importorskip("gguf")
    path = block_model(tmp_path / "a.gguf", {"": "Q8_0"})
    whole = open_checkpoint(path)
    original = whole.weights.layers[0].down_proj
    values = gguf.dequantize(
        original.payload.reshape(original.shape[0], -1), gguf.GGMLQuantizationType.Q8_0
    )
    raw = gguf.quantize(values, gguf.GGMLQuantizationType.MXFP4).tobytes()
    path = block_model(tmp_path / "b.gguf", {"": "Q8_0"}, given={"ffn_down": ("MXFP4", raw)})
    calls = []
    mixed = open_checkpoint(path, progress=lambda *call: calls.append(call))
    assert {layer.down_proj.dtype.name for layer in mixed.weights.layers} == {"bfloat16"}
    assert mixed.weights.layers[0].up_proj.dtype == "q8_0"
    assert {what for _, _, what in calls} == {"converting to bfloat16"}
    assert_near(logits(mixed), logits(open_checkpoint(path, dtype="float32")), 0.02)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_blocks_are_quantised_anew_when_asked(tmp_path, quantization):
    path = block_model(tmp_path / "a.gguf", MIXED, tied=True)
    checkpoint = open_checkpoint(path, quantization=quantization)
    assert {weight.dtype for weight in projections(checkpoint.weights)} == {quantization}
    assert checkpoint.weights.embedding.dtype == "q4_k"  # as it lies; the head is a copy
    expected = logits(open_checkpoint(path, dtype="float32"))
    # Random Q4_K groups have a mean of their own, unlike a model's, which a rotation gathers in one
    # element: int8 of groups of 32 as they are comes to 0.021 here, rotated ones to 0.036.
    assert_near(logits(checkpoint), expected, {"int8": 0.045, "int4": 0.25}[quantization])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_floats_beside_what_is_quantised_stay_as_they_lie(tmp_path, quantization):
    path = block_model(tmp_path / "a.gguf", {})
    checkpoint = open_checkpoint(path, quantization=quantization)
    assert checkpoint.config.dtype == "float32"
    assert isinstance(mapping_under(checkpoint.weights.embedding), mmap.mmap)
    norms = [array for array in floats(checkpoint.weights) if array.ndim == 1]
    assert norms
    assert all(mapping_under(norm) is None for norm in norms)  # on pages of their own
    assert checkpoint.mapped_bytes == checkpoint.weights.embedding.nbytes
    assert resident_bytes(path) < 0.2 * path.stat().st_size


def test_the_types_of_a_layer_are_multiplied_run_by_run(tmp_path):
    checkpoint = open_checkpoint(block_model(tmp_path / "a.gguf", MIXED))
    model = Llama(checkpoint.config, checkpoint.weights)
    (qk, v), (gate_up,) = model.layers[0].qkv_proj.runs, model.layers[0].gate_up_proj.runs
    q_dim = BLOCK_CONFIG.n_heads * BLOCK_CONFIG.head_dim
    kv_dim = BLOCK_CONFIG.n_kv_heads * BLOCK_CONFIG.head_dim
    layer = checkpoint.weights.layers[0]
    assert qk == ((layer.q_proj, layer.k_proj), slice(0, q_dim + kv_dim))
    assert v == ((layer.v_proj,), slice(q_dim + kv_dim, q_dim + 2 * kv_dim))
    assert gate_up[0] == (layer.gate_proj, layer.up_proj)
    assert np.isfinite(logits(checkpoint)).all()  # one call takes no such layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [*({"": kind} for kind in KINDS), MIXED], ids=str)
def test_repacked_blocks_have_the_bits_of_mapped_ones(tmp_path, kinds, tied):
    path, calls = block_model(tmp_path / "a.gguf", kinds, tied=tied), []
    mapped = open_checkpoint(path)
    checkpoint = open_checkpoint(
        path, repack=True, check="finite", progress=lambda *call: calls.append(call)
    )
    for ours, stored in zip(
        projections(checkpoint.weights), projections(mapped.weights), strict=True
    ):
        assert ours.dtype == stored.dtype + TILED
        assert mapping_under(ours.payload) is None
    assert (checkpoint.weights.lm_head is checkpoint.weights.embedding) is tied
    if not tied:  # of which a step reads few rows
        assert isinstance(mapping_under(checkpoint.weights.embedding.payload), mmap.mmap)
    assert all(
        mapping_under(norm) is None for norm in floats(checkpoint.weights) if norm_like(norm)
    )
    assert {what.split()[0] for _, _, what in calls} == {"repacking", "checking"}
    repacking = [(done, total) for done, total, what in calls if what.startswith("repacking")]
    assert repacking[-1][0] == repacking[-1][1]
    assert np.array_equal(logits(checkpoint), logits(mapped))


def norm_like(array):
    return isinstance(array, np.ndarray) and array.ndim == 1


def test_a_repacked_file_is_no_longer_resident(tmp_path):
    path = block_model(tmp_path / "a.gguf", {"": "Q4_0"}, tied=True)
    checkpoint = open_checkpoint(path, repack=True)
    assert checkpoint.mapped_bytes == 0
    assert resident_bytes(path) < 0.2 * path.stat().st_size


def test_what_is_decoded_or_quantised_is_not_repacked(tmp_path):
    path = block_model(tmp_path / "a.gguf", MIXED)
    floats_only = open_checkpoint(path, dtype="float32", repack=True)
    assert all(isinstance(weight, np.ndarray) for weight in projections(floats_only.weights))
    quantised = open_checkpoint(path, quantization="int4", repack=True)
    assert {weight.dtype for weight in projections(quantised.weights)} == {"int4"}
