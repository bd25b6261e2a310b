"""Adapters of every kind that PEFT wrote: the logits are PEFT's, merged and for requests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.goldens import make_engine
from safetensors.numpy import load_file, save_file

import codellama_rt as clrt
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.checkpoint.tensor_names import pairs_first
from codellama_rt.engine.branches import Branches
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.model.lora import merged, merged_config

FOLDER = Path(__file__).parent.parent / "data" / "adapters"
GOLDENS = np.load(FOLDER / "logits.npz")
IDS = GOLDENS["ids"].tolist()
KINDS = [name for name in GOLDENS.files if name != "ids"]
ONLY_MERGED = ["saved_norms", "saved_projection"]
ONLY_APPLIED = ["lora_bias"]
TOLERANCE = 2e-4  # of logits up to 13; float32 through two layers gives up to 7e-5


def base_of(kind):
    """The checkpoint that an adapter is for."""
    values = json.loads((FOLDER / kind / "adapter_config.json").read_text())
    return open_checkpoint(FOLDER / values["base_model_name_or_path"])


def opened(kind):
    checkpoint = base_of(kind)
    return checkpoint, load_adapter(FOLDER / kind, checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ONLY_MERGED])
def test_applied_to_a_request(kind):
    checkpoint, adapter = opened(kind)
    model = Llama(checkpoint.config, checkpoint.weights)
    found = sequence_logits(model, IDS, adapter=adapter)
    np.testing.assert_allclose(found, GOLDENS[kind], rtol=0, atol=TOLERANCE)
    assert np.abs(sequence_logits(model, IDS) - GOLDENS[kind]).max() > 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ONLY_APPLIED])
def test_merged(kind):
    checkpoint, adapter = opened(kind)
    weights = merged(checkpoint.weights, adapter)
    config = merged_config(checkpoint.config, weights, adapter)
    found = sequence_logits(Llama(config, weights), IDS)
    np.testing.assert_allclose(found, GOLDENS[kind], rtol=0, atol=TOLERANCE)
    assert config.tie_word_embeddings == (weights.lm_head is weights.embedding)


@pytest.mark.parametrize("kind", ONLY_MERGED)
def test_what_requests_cannot_have(kind):
    checkpoint, adapter = opened(kind)
    with pytest.raises(
        CheckpointError, match=r"replaces whole modules.*merge it with LLM\(adapter"
    ):
        sequence_logits(Llama(checkpoint.config, checkpoint.weights), IDS, adapter=adapter)
    with (
        clrt.LLM(checkpoint.path, kv_memory="1MB") as llm,
        pytest.raises(CheckpointError, match=r"merge it with LLM\(adapter"),
    ):
        llm.load_adapter(FOLDER / kind)


@pytest.mark.parametrize("kind", ONLY_APPLIED)
def test_what_weights_cannot_have(kind):
    checkpoint, adapter = opened(kind)
    with pytest.raises(ValueError, match=r"has a bias for lm_head.*apply it to requests"):
        merged(checkpoint.weights, adapter)


@pytest.mark.parametrize(
    "kind",
    ["dora", "tied_saved", "biased_lora_bias", "tied_tokens", "embeddings", "saved_final_norm"],
)
def test_through_the_llm(kind, tmp_path):
    """Merged when it is opened, applied by `load_adapter`, and saved once it is merged."""
    path = base_of(kind).path
    options = {"kv_memory": "1MB", "dtype": "float32"}
    with clrt.LLM(path, **options) as llm:
        found = llm.logits(IDS, adapter=llm.load_adapter(FOLDER / kind))
        last = llm.hidden_states(IDS, adapter=llm.load_adapter(FOLDER / kind))[-1]
    np.testing.assert_allclose(found, GOLDENS[kind], rtol=0, atol=TOLERANCE)
    with clrt.LLM(path, adapter=FOLDER / kind, **options) as llm:
        np.testing.assert_allclose(llm.logits(IDS), GOLDENS[kind], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(llm.hidden_states(IDS)[-1], last, rtol=0, atol=TOLERANCE)
        clrt.LlamaForCausalLM(llm).save_pretrained(tmp_path / "saved")
    with clrt.LLM(tmp_path / "saved", **options) as llm:
        np.testing.assert_allclose(llm.logits(IDS), GOLDENS[kind], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("base", ["base", "tied", "biased"])
def test_rows_have_the_same_bits_in_any_company(base):
    """With requests of other adapters and of none, in any order."""
    checkpoint = open_checkpoint(FOLDER / base)
    model = Llama(checkpoint.config, checkpoint.weights)
    values = {kind: (FOLDER / kind / "adapter_config.json").read_text() for kind in KINDS}
    kinds = [k for k in KINDS if f'"{base}"' in values[k] and k not in ONLY_MERGED]
    adapters = [None, *(load_adapter(FOLDER / k, model.config, model.weights) for k in kinds)]
    alone = [sequence_logits(model, IDS, adapter=adapter)[-1] for adapter in adapters]
    assert len({row.tobytes() for row in alone}) == len(alone)
    forward = list(range(len(adapters)))
    for order in (forward, forward[::-1], [*forward[1:], 1, 1, 0]):
        with Branches(make_engine(model)) as branches:
            live = [branches.add(IDS, adapters[i]) for i in order]
            rows = branches.logits(live)
        for i, row in zip(order, rows, strict=True):
            assert row.tobytes() == alone[i].tobytes()


@pytest.mark.parametrize("kind", ["dora", "embeddings", "bias_all", "saved_ends"])
def test_rows_of_gguf_files(kind):
    """DoRA's factors, biases and whole modules follow the order of the rows of q and k."""
    checkpoint = base_of(kind)
    config = replace(checkpoint.config, rope_interleaved=True)

    def reordered(rows):
        return pairs_first(rows, config.head_dim)

    layers = [
        replace(layer, q_proj=reordered(layer.q_proj), k_proj=reordered(layer.k_proj))
        for layer in checkpoint.weights.layers
    ]
    biases = tuple(
        {n: reordered(b) if n in ("q_proj", "k_proj") else b for n, b in layer.items()}
        for layer in checkpoint.weights.biases
    )
    weights = replace(checkpoint.weights, layers=layers, biases=biases)
    other = load_adapter(FOLDER / kind, config, weights)
    found = sequence_logits(Llama(config, weights), IDS, adapter=other)
    np.testing.assert_allclose(found, GOLDENS[kind], rtol=0, atol=TOLERANCE)


def test_biases_of_one_layer_can_be_merged_and_saved(tmp_path):
    """The other layers and projections get zeros, as config.json knows only all or none."""
    checkpoint = base_of("lora_bias")
    shutil.copytree(FOLDER / "lora_bias", tmp_path / "a")
    tensors = load_file(FOLDER / "lora_bias" / "adapter_model.safetensors")
    kept = {name: array for name, array in tensors.items() if "layers.0.self_attn" in name}
    save_file(kept, tmp_path / "a" / "adapter_model.safetensors")
    options = {"kv_memory": "1MB", "dtype": "float32"}
    with clrt.LLM(checkpoint.path, **options) as llm:
        plain = llm.logits(IDS)
        applied = llm.logits(IDS, adapter=llm.load_adapter(tmp_path / "a"))
    assert np.abs(applied - plain).max() > 1
    with clrt.LLM(checkpoint.path, adapter=tmp_path / "a", **options) as llm:
        np.testing.assert_allclose(llm.logits(IDS), applied, rtol=0, atol=TOLERANCE)
        clrt.LlamaForCausalLM(llm).save_pretrained(tmp_path / "saved")
    with clrt.LLM(tmp_path / "saved", **options) as llm:
        np.testing.assert_allclose(llm.logits(IDS), applied, rtol=0, atol=TOLERANCE)


def test_what_was_saved_beside_unchanged_is_not_applied(tmp_path):
    checkpoint = base_of("plain")
    shutil.copytree(FOLDER / "plain", tmp_path / "a")
    tensors = load_file(FOLDER / "plain" / "adapter_model.safetensors")
    base = load_file(FOLDER / "base" / "model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = base["model.embed_tokens.weight"]
    tensors["base_model.model.lm_head.base_layer.weight"] = base["lm_head.weight"] * 2
    tensors["base_model.model.lm_head.original_module.weight"] = base["lm_head.weight"]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    adapter = load_adapter(tmp_path / "a", checkpoint.config, checkpoint.weights)
    assert list(adapter.whole) == [(None, "lm_head")]
    model = Llama(checkpoint.config, checkpoint.weights)
    found = sequence_logits(model, IDS, adapter=adapter)
    np.testing.assert_allclose(found, 2 * GOLDENS["plain"], rtol=0, atol=TOLERANCE)
