"""A small model is copied into huge pages: the same bits, counted; a large one is not."""

import mmap

import numpy as np
import pytest
from helpers.checkpoint_files import TINY, TINY_NAMES
from helpers.quantized_models import mapping_under
from helpers.tiny_llm import KV_MEMORY

from codellama_rt import LLM
from codellama_rt.checkpoint import open_checkpoint, weight_loading
from codellama_rt.checkpoint.quantize import is_quantized
from codellama_rt.checkpoint.tensor_names import HEAD
from codellama_rt.llm.memory_plan import estimate, find_model, weight_bytes
from codellama_rt.llm.plan import Plan
from codellama_rt.ops.quantized import Quantized
from codellama_rt.tools.convert.convert import convert


def matrices(weights):
    """Return what every step reads but norms: (array, or payload) each."""
    layers = [vars(layer).values() for layer in weights.layers]
    every = [weight for layer in layers for weight in layer] + [weights.lm_head]
    every = [weight for weight in every if len(weight.shape) == 2]
    return [weight.payload if isinstance(weight, Quantized) else weight for weight in every]


def is_mapped(array):
    return isinstance(mapping_under(array), mmap.mmap)


@pytest.fixture(params=[*TINY_NAMES[:3], "tied_fp32", "int8"])
def folder(request, tmp_path):
    if request.param != "int8":
        return TINY / request.param
    convert(TINY / TINY_NAMES[1], tmp_path / "int8", quantization="int8")
    return tmp_path / "int8"


def test_small_models_are_copied_unless_told_not_to(folder):
    with (
        LLM(folder, kv_memory=KV_MEMORY) as copied,
        LLM(folder, kv_memory=KV_MEMORY, repack=False) as mapped,
    ):
        ours, theirs = matrices(copied.model.weights), matrices(mapped.model.weights)
        assert not any(map(is_mapped, ours))
        assert all(map(is_mapped, theirs))
        assert not any(array.flags.writeable for array in ours)
        assert [a.tobytes() for a in ours] == [a.tobytes() for a in theirs]
        tokens = list(range(1, 9))
        assert np.array_equal(copied.logits(tokens), mapped.logits(tokens))


@pytest.mark.parametrize("repack", [False, True])
def test_the_estimate_counts_the_copies(folder, repack):
    found = estimate(find_model(folder), Plan(repack=repack), context=1)
    checkpoint = open_checkpoint(folder, repack=repack)
    weights = checkpoint.weights
    assert found.read_per_token == weight_bytes(weights)
    assert found.weights - found.made == checkpoint.mapped_bytes
    assert found.repacked == repack * sum(array.nbytes for array in matrices(weights))
    assert (found.loading > 0) is repack


def test_an_embedding_that_is_no_head_stays_in_the_file():
    embedding = open_checkpoint(TINY / TINY_NAMES[0], repack=True).weights.embedding
    assert is_mapped(embedding)


def test_copying_is_reported():
    calls, opened = [], find_model(TINY / TINY_NAMES[0])
    open_checkpoint(TINY / TINY_NAMES[0], repack=True, progress=lambda *call: calls.append(call))
    names = [name for name in opened.tensors if is_quantized(name) or name == HEAD]
    total = sum(opened.tensors[name].num_bytes for name in names)
    assert calls[-1] == (total, total, "copying weights")


def test_larger_models_stay_in_the_file(folder, monkeypatch):
    total = sum(array.nbytes for array in matrices(open_checkpoint(folder).weights))
    for most, stays in [(total, False), (total - 1, True)]:
        monkeypatch.setattr(weight_loading, "_COPIED_BYTES", most)
        weights = matrices(open_checkpoint(folder, repack=True).weights)
        assert [is_mapped(array) for array in weights] == [stays] * len(weights)
        found = estimate(find_model(folder), Plan(), context=1)
        assert (found.repacked > 0) is not stays
