import dataclasses
import json
import math

import numpy as np
import pytest
from helpers.checkpoint_files import TINY, TINY_NAMES
from helpers.oracle import forward

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.model.config import ModelConfig, RopeScaling
from codellama_rt.model.rope import RotaryEmbedding, inverse_frequencies

LOGITS_TOLERANCE = 1e-4
SCALINGS = [name for name in TINY_NAMES if name.startswith("rope_")]
PLAIN = ModelConfig(
    n_layers=1, n_heads=1, n_kv_heads=1, head_dim=128, dim=128, hidden_dim=1, vocab_size=1
)


def int32(values):
    return np.asarray(values, np.int32)


def golden(name):
    folder = TINY / name
    description = json.loads((folder / "golden.json").read_text())
    return open_checkpoint(folder), description, np.load(folder / "golden.npz")


@pytest.mark.parametrize("name", TINY_NAMES)
def test_logits_of_every_tiny_checkpoint(name):
    checkpoint, description, arrays = golden(name)
    for i, case in enumerate(description["cases"]):
        n_tokens = len(case["prompt"])
        logits = forward(
            checkpoint.weights, checkpoint.config, case["prompt"], prompt_length=n_tokens
        )
        assert np.abs(logits - arrays[f"logits_{i}"]).max() < LOGITS_TOLERANCE, (name, i)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_greedy_tokens_of_every_tiny_checkpoint(name):
    """Follows the golden continuation token by token; for dynamic scaling each has its own base."""
    checkpoint, description, _ = golden(name)
    for case in description["cases"]:
        prompt, expected = case["prompt"], case["greedy_no_eos"]
        sequence = prompt + expected[:-1]
        logits = forward(checkpoint.weights, checkpoint.config, sequence, prompt_length=len(prompt))
        assert logits[len(prompt) - 1 :].argmax(axis=-1).tolist() == expected


def test_offsets_of_the_goldens():
    checkpoint, description, arrays = golden("gqa_theta1e6_bf16")
    for case in description["position_offset"]:
        prompt = description["cases"][case["prompt_index"]]["prompt"]
        logits = forward(
            checkpoint.weights,
            checkpoint.config,
            prompt,
            first_position=case["offset"],
        )
        assert np.abs(logits - arrays[case["npz_key"]]).max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("which", [0, 1])
def test_long_prompts(which):
    checkpoint, description, arrays = golden("hd128_gqa_bf16")
    case = description["long"][which]
    prompt = arrays[case["prompt_npz_key"]]
    logits = forward(checkpoint.weights, checkpoint.config, prompt, rows=case["positions"])
    assert np.abs(logits - arrays[case["npz_key"]]).max() < LOGITS_TOLERANCE


def test_angles_at_100k_are_rounded_once_from_float32_frequencies():
    positions = int32([0, 1, 16384, 99_999, 131_071])
    config = dataclasses.replace(PLAIN, rope_theta=1e6)
    cos, sin, index = RotaryEmbedding(config).lookup(positions)
    frequencies = inverse_frequencies(config)[0].astype(np.longdouble)
    exact = np.longdouble(1e6) ** (-np.arange(0, 128, 2, dtype=np.longdouble) / 128)
    assert np.abs(frequencies / exact - 1).max() < 2**-22
    angles = (positions[:, None] * frequencies).astype(np.float32).astype(np.longdouble)
    assert np.abs(cos[index] - np.cos(angles)).max() <= 2**-24
    assert np.abs(sin[index] - np.sin(angles)).max() <= 2**-24
    assert cos.dtype == sin.dtype == np.float32


def test_table_grows_in_place_and_rows_never_change():
    rope = RotaryEmbedding(PLAIN)
    first, _, _ = rope.lookup(int32([5]))
    before, address = first.copy(), first.ctypes.data
    grown, _, index = rope.lookup(int32([5, 16383, 0]))
    assert grown.ctypes.data == address
    assert np.array_equal(grown[: len(before)], before)
    assert index.tolist() == [5, 16383, 0]
    beyond, _, _ = rope.lookup(int32([20_000]))  # past max_position_embeddings: moved, not changed
    assert np.array_equal(beyond[: len(grown)], grown)
    whole, _, _ = RotaryEmbedding(PLAIN).lookup(int32([20_000]))
    assert np.array_equal(beyond, whole)


def test_no_positions():
    cos, sin, index = RotaryEmbedding(PLAIN).lookup(int32([]))
    assert cos.shape[1] == sin.shape[1] == 64
    assert index.size == 0


def scaled(kind, factor, **fields):
    scaling = RopeScaling(kind, factor, **fields)
    return dataclasses.replace(PLAIN, rope_scaling=scaling, max_position_embeddings=4096)


def test_dynamic_base_follows_the_length_of_each_token():
    rope = RotaryEmbedding(scaled("dynamic", 2.0))
    plain, _, _ = RotaryEmbedding(PLAIN).lookup(int32([5000]))
    cos, _, index = rope.lookup(int32([7, 7, 4999]), int32([4096, 8192, 5000]))
    assert index.tolist() == [0, 1, 2]
    assert np.array_equal(cos[0], plain[7])  # not longer than trained: unscaled
    base = 10000.0 * (2.0 * 8192 / 4096 - 1.0) ** (128 / 126)
    assert np.allclose(cos[1], np.cos(7 * base ** -(np.arange(0, 128, 2) / 128)), atol=1e-7)
    assert not np.array_equal(cos[1], plain[7])
    assert not np.array_equal(cos[2], plain[4999])


def test_dynamic_rows_do_not_depend_on_the_batch():
    rope = RotaryEmbedding(scaled("dynamic", 4.0))
    positions = int32([100, 5000, 6000, 3])
    lengths = int32([5000, 5001, 7000, 4])
    together, _, _ = rope.lookup(positions, lengths)
    for i in range(len(positions)):
        alone, _, _ = rope.lookup(positions[i : i + 1], lengths[i : i + 1])
        assert np.array_equal(alone[0], together[i])


def test_dynamic_needs_lengths():
    with pytest.raises(ValueError, match="rope_lengths must be int32"):
        RotaryEmbedding(scaled("dynamic", 2.0)).lookup(int32([1]))


def yarn_by_the_pair(config):
    """Yarn's frequencies, pair by pair, in the words of its paper."""
    s, dim = config.rope_scaling, config.head_dim
    bounds = [
        dim
        * math.log(s.original_max_position_embeddings / (beta * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
        for beta in (s.beta_fast, s.beta_slow)
    ]
    low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if s.truncate else bounds
    low, high = max(low, 0), min(high, dim - 1)
    frequencies = []
    for i in range(dim // 2):
        frequency = config.rope_theta ** (-2 * i / dim)
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequencies.append(ramp * frequency / s.factor + (1 - ramp) * frequency)
    return frequencies


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("betas", [(32.0, 1.0), (16.0, 2.0)])
def test_yarn_frequencies(truncate, betas):
    config = scaled(
        "yarn",
        8.0,
        original_max_position_embeddings=2048,
        beta_fast=betas[0],
        beta_slow=betas[1],
        truncate=truncate,
    )
    frequencies, _ = inverse_frequencies(config)
    assert np.allclose(frequencies, yarn_by_the_pair(config), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.1 * math.log(8) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 0.7}, 0.1 * math.log(8) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.7, "mscale_all_dim": 0.3},
            (0.07 * math.log(8) + 1) / (0.03 * math.log(8) + 1),
        ),
    ],
)
def test_yarn_attention_factor_scales_the_table(fields, expected):
    config = scaled("yarn", 8.0, original_max_position_embeddings=2048, **fields)
    assert inverse_frequencies(config)[1] == pytest.approx(expected, rel=1e-12)
    cos, sin, _ = RotaryEmbedding(config).lookup(int32([77]))
    assert np.allclose(cos[77] ** 2 + sin[77] ** 2, expected**2, rtol=1e-6)


def test_yarn_of_a_degenerate_range_is_a_step():
    config = scaled("yarn", 2.0, original_max_position_embeddings=1)
    frequencies, _ = inverse_frequencies(config)
    assert np.isfinite(frequencies).all()


def test_factors_divide_the_frequencies():
    factors = tuple(np.linspace(1.0, 8.0, 64))
    frequencies, _ = inverse_frequencies(scaled("factors", 1.0, frequency_factors=factors))
    assert np.allclose(frequencies * factors, inverse_frequencies(PLAIN)[0], rtol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_changes_the_logits(name):
    """Guards the goldens above: without the scaling they would fail."""
    checkpoint, description, arrays = golden(name)
    config = dataclasses.replace(checkpoint.config, rope_scaling=None)
    logits = forward(checkpoint.weights, config, description["cases"][3]["prompt"])
    assert np.abs(logits - arrays["logits_3"]).max() > 100 * LOGITS_TOLERANCE
