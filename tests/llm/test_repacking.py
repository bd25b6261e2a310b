"""LLM repacks the blocks of a GGUF file unless it is told not to: same tokens, other memory."""

import mmap

import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.checkpoint_files import TINY
from helpers.quantized_models import block_model, mapping_under, projections, resident_bytes
from helpers.tiny_llm import KV_MEMORY

from codellama_rt import LLM, SamplingParams
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.cli.options import ModelOptions
from codellama_rt.cli.run import open_model
from codellama_rt.llm import memory_plan
from codellama_rt.llm.memory_plan import estimate, find_model, require_memory, weight_bytes
from codellama_rt.llm.plan import Plan
from codellama_rt.ops.quantized import GGUF_BLOCKS, TILED, Quantized

MIXED = {"attn_v": "Q6_K", "ffn_down": "Q5_0", "output.": "Q3_K", "": "Q4_1"}
PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def completed(path, **options):
    with LLM(path, kv_memory=KV_MEMORY, **options) as llm:
        return llm.generate([PROMPT, PROMPT[:5]], PARAMS), llm.model.weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [*({"": kind.upper()} for kind in GGUF_BLOCKS), MIXED], ids=str)
def test_tokens_are_the_same(tmp_path, kinds, tied):
    path = block_model(tmp_path / "a.gguf", kinds, tied=tied)
    repacked, weights = completed(path)
    mapped, in_file = completed(path, repack=False)
    assert [c.token_ids for c in repacked] == [c.token_ids for c in mapped]
    assert all(weight.dtype.endswith(TILED) for weight in projections(weights))
    assert all(
        isinstance(mapping_under(weight.payload), mmap.mmap) for weight in projections(in_file)
    )


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_is_what_is_loaded(tmp_path, repack, tied):
    path = block_model(tmp_path / "a.gguf", MIXED, tied=tied)
    weights = open_checkpoint(path, repack=repack).weights
    checkpoint = open_checkpoint(path, repack=repack)
    found = estimate(find_model(path), Plan(repack=repack), context=1)
    assert found.read_per_token == weight_bytes(weights)
    assert found.weights == weight_bytes(weights) + (0 if tied else weights.embedding.nbytes)
    assert found.weights - found.made == checkpoint.mapped_bytes
    tiles = {id(w): w.nbytes for w in projections(weights) if w.dtype.endswith(TILED)}
    assert found.repacked == sum(tiles.values())
    assert (found.repacked > 0) is repack
    assert found.decoder == 0, "nothing is decoded"


def test_other_devices_take_the_blocks_themselves(tmp_path):
    path = block_model(tmp_path / "a.gguf", MIXED)
    assert estimate(find_model(path), Plan(device="ascend"), context=1).repacked == 0


def test_too_little_memory_names_the_way_out(tmp_path, monkeypatch):
    path = block_model(tmp_path / "a.gguf", MIXED)
    needed = estimate(find_model(path), Plan(), context=1)
    with pytest.raises(RuntimeError, match=r"use repack=False, which leaves the weights"):
        require_memory(needed, 10**6)
    in_file = estimate(find_model(path), Plan(repack=False), context=1)
    with pytest.raises(RuntimeError, match=r"are available; use quantization='int4'"):
        require_memory(in_file, 10**6)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: 10**6)
    with pytest.raises(RuntimeError, match="repack=False"):
        LLM(path)


def test_progress_and_the_file_afterwards(tmp_path):
    path, calls = block_model(tmp_path / "a.gguf", {"": "Q4_0"}, tied=True), []
    with LLM(path, kv_memory=KV_MEMORY, progress=lambda *call: calls.append(call)) as llm:
        llm.generate(PROMPT, PARAMS)
        assert resident_bytes(path) < 0.2 * path.stat().st_size
    assert {what for _, _, what in calls} == {"repacking Q4_0"}
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("repack", [False, True])
def test_the_command_line_shows_it(tmp_path, monkeypatch, repack):
    shown = []
    monkeypatch.setattr(
        "codellama_rt.cli.progress.ProgressBar.update", lambda bar, *call: shown.append(call[2])
    )
    path = block_model(tmp_path / "a.gguf", {"": "Q4_0"})
    with open_model(ModelOptions(str(path), kv_memory="64MB", repack=repack)) as llm:
        assert llm.model.weights.lm_head.dtype == "q4_0" + TILED * repack
    assert set(shown) == {"repacking Q4_0"} if repack else shown == []


def test_awq_and_gptq_are_repacked_twice():
    """Into blocks, and these as all others."""
    name = TINY.parent / "reference" / "awq"
    blocks = open_checkpoint(name).weights.layers[0].q_proj
    tiles = open_checkpoint(name, repack=True).weights.layers[0].q_proj
    assert isinstance(tiles, Quantized)
    assert tiles.dtype == blocks.dtype + TILED
    found = estimate(find_model(name), Plan(), context=1)
    assert found.repacked == 0, "there is no file of blocks to leave them in"
    assert found.made >= tiles.nbytes


def test_an_adapter_over_repacked_blocks(tmp_path):
    path = block_model(tmp_path / "a.gguf", MIXED)
    options = {"kv_memory": KV_MEMORY}
    with LLM(path, **options) as repacked, LLM(path, repack=False, **options) as mapped:
        folder = write_adapter(tmp_path / "adapter", repacked.config, seed=3)
        found, expected, plain = (
            llm.logits(PROMPT, adapter=adapter)
            for llm, adapter in [
                (repacked, repacked.load_adapter(folder)),
                (mapped, mapped.load_adapter(folder)),
                (mapped, None),
            ]
        )
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, plain)
