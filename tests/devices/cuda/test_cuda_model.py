"""Whole models on the device: the CPU's tokens and logits, and determinism."""

import gc
from dataclasses import replace

import numpy as np
import pytest
from helpers.builders import int32
from helpers.checkpoint_files import TINY
from helpers.goldens import run, tiny_golden
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.llm.kv_plan import plan_cuda_blocks
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.placement import place
from codellama_rt.llm.plan import Plan
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.cuda import llama as cuda_model
from codellama_rt.model.cuda import tensor
from codellama_rt.model.cuda.kv_cache import DeviceKVCache, row_bytes
from codellama_rt.model.cuda.step import Room, StepInputs, StepShape
from codellama_rt.model.cuda.weights import upload

pytestmark = pytest.mark.usefixtures("cuda")
NAMES = ["gqa_theta1e6_bf16", "hd128_gqa_bf16", "rope_dynamic2"]
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(autouse=True)
def little_workspace(monkeypatch):
    monkeypatch.setattr(cuda_model, "WORKSPACE_BYTES", 4 << 20)


def make_model(name, **options):
    checkpoint = open_checkpoint(tiny_golden(name).folder, dtype="bfloat16")
    usual = {"kv_dtype": "bfloat16", "block_size": 16, "max_num_seqs": 8, "kv_memory": 1 << 20}
    plan = Plan(device="cuda", **{**usual, **options})
    return place(plan, checkpoint.config, checkpoint.weights)


def generate(model, cache, prompts, params=GREEDY, **options):
    engine = Engine(model, cache, max_model_len=256, **options)
    return run(engine, prompts, params)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits(name):
    """Against float32: at most what Transformers loses in bfloat16, by the goldens' yardstick."""
    golden = tiny_golden(name)
    model, _ = make_model(name)
    for i, case in enumerate(golden.cases[:1]):
        positions, expected = golden.logits(i)
        logits = sequence_logits(model, case["prompt"], kv_dtype="bfloat16")
        error = np.abs(logits[positions] - expected).max()
        assert error <= 1.5 * lost_by_bfloat16(name, case["prompt"], positions, expected)


def lost_by_bfloat16(name, prompt, positions, expected):
    """What the CPU's kernels lose over bfloat16 weights and cache, and a bfloat16 residual."""
    reference = tiny_golden(name).model("bfloat16")
    logits = sequence_logits(reference, prompt, kv_dtype="bfloat16")[positions]
    rounding = np.abs(expected).max() * 2**-7  # a bfloat16 residual stream, which the CPU has not
    return np.abs(logits - expected).max() + rounding


def prompts_of(name, rng, lengths):
    vocab = tiny_golden(name).model().config.vocab_size
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", NAMES[:2])
def test_tokens_do_not_depend_on_batch_chunk_or_graph(name, rng):
    prompts = prompts_of(name, rng, [5, 40, 17])
    model, cache = make_model(name)
    alone = [generate(model, cache, [prompt])[0] for prompt in prompts]
    assert generate(model, cache, prompts) == alone
    assert generate(model, cache, prompts, max_num_batched_tokens=9) == alone
    assert generate(model, cache, prompts, prefix_caching=False, max_num_seqs=2) == alone


def test_logits_do_not_depend_on_the_chunk(rng):
    name = NAMES[1]
    (prompt,) = prompts_of(name, rng, [50])
    model, _ = make_model(name)
    options = {"kv_dtype": "bfloat16"}
    whole = sequence_logits(model, prompt, **options)
    for chunk_size in (1, 7, 33):
        assert_equal_bits(sequence_logits(model, prompt, chunk_size=chunk_size, **options), whole)


def test_one_graph_serves_every_step_of_its_bucket(rng, cuda, monkeypatch):
    model, cache = make_model(NAMES[1])
    captured = []
    real = cuda_model.DecodeGraph._capture
    monkeypatch.setattr(
        cuda_model.DecodeGraph, "_capture", lambda graph: captured.append(1) or real(graph)
    )
    generate(model, cache, prompts_of(NAMES[1], rng, [5, 9, 30]))
    assert len(captured) == 1  # three sequences, in the bucket of four
    generate(model, cache, prompts_of(NAMES[1], rng, [8] * 4))
    assert len(captured) == 1
    generate(model, cache, prompts_of(NAMES[1], rng, [8]))
    assert len(captured) == 2


@pytest.mark.parametrize(("quantization", "kv_dtype"), [("int8", "bfloat16"), ("int4", "bfloat16"),
                                                        (None, "fp8"), (None, "int8")])  # fmt: skip
def test_quantised_weights_and_caches(rng, quantization, kv_dtype):
    name = NAMES[1]
    (prompt,) = prompts_of(name, rng, [40])
    plain, _ = make_model(name)
    expected = sequence_logits(plain, prompt, kv_dtype="bfloat16")
    model, _ = make_model(name, quantization=quantization, kv_dtype=kv_dtype)
    logits = sequence_logits(model, prompt, kv_dtype=kv_dtype)
    limit = {"int4": 0.5}.get(quantization, 0.2)  # of the logits' spread
    assert np.abs(logits - expected).mean() <= limit * expected.std()
    options = {"kv_dtype": kv_dtype, "chunk_size": 11}
    assert_equal_bits(sequence_logits(model, prompt, **options), logits)


def test_llm_on_cuda(rng, monkeypatch):
    folder = tiny_golden(NAMES[1]).folder
    (prompt,) = prompts_of(NAMES[1], rng, [12])
    with LLM(folder, device="cuda", kv_memory="1MB", kv_dtype="fp8", max_model_len=64) as llm:
        (completion,) = llm.generate(prompt, GREEDY)
        assert len(completion.token_ids) == 6
        logits = llm.logits([*prompt, *completion.token_ids[:-1]])
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == completion.token_ids


def test_copy_blocks_of_every_layer(rng):
    _, cache = make_model(NAMES[1], kv_dtype="int8")
    for pages in cache.layers[-1]:
        bytes_of = rng.integers(0, 256, pages.payload.shape, np.uint8)
        tensor.copy(pages.payload, bytes_of)
    before = cache.layers[-1][1].payload.numpy().reshape(cache.num_blocks, -1)
    cache.copy_blocks(int32([[0, 2], [2, 1]]))
    after = cache.layers[-1][1].payload.numpy().reshape(cache.num_blocks, -1)
    assert_equal_bits(after[:3], before[[0, 0, 0]])
    assert_equal_bits(after[3:], before[3:])


def test_inputs_of_a_smaller_step_are_padded():
    sequence = Sequence(int32_list([5, 6, 7]), 3, (0, 0, 0), first_logit=2)
    sequence.block_ids = int32_list([4])
    batch = build_batch([Chunk(sequence, 2, 3, 1)], 16)
    inputs = StepInputs(StepShape(4, 4, 2, 4, 3), Room())
    rope = np.full((9, 3), 1, np.float32), np.full((9, 3), 2, np.float32), int32([2])
    inputs.fill(batch, rope)
    host = inputs.host
    assert host["token_ids"].tolist() == [7, 0, 0, 0]
    assert host["slot_mapping"].tolist() == [4 * 16 + 2, -1, -1, -1]
    assert host["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 4]
    assert host["seq_lens"].tolist() == [3, 0, 0, 0]
    assert host["block_tables"][0, 0] == 4
    inputs.copy()
    assert inputs.device["seq_lens"].numpy().tolist() == [3, 0, 0, 0]


def test_planned_pages(cuda):
    config = tiny_golden(NAMES[1]).model().config
    page = 2 * config.n_layers * config.n_kv_heads * 16 * row_bytes(config, "fp8")
    plan = Plan(kv_dtype="fp8", block_size=16, max_num_seqs=2, kv_memory=5 * page)
    assert plan_cuda_blocks(config, plan, row_bytes(config, "fp8")) == 5
    with pytest.raises(RuntimeError, match=r"KV cache of 100 tokens takes .* lower max_model_len"):
        plan_cuda_blocks(config, replace(plan, max_model_len=100), row_bytes(config, "fp8"))


def test_refusals():
    checkpoint = open_checkpoint(tiny_golden(NAMES[1]).folder, dtype="float32")
    with pytest.raises(ValueError, match="load them with dtype='bfloat16'"):
        upload(checkpoint.weights)
    packed = open_checkpoint(TINY.parent / "reference" / "awq")
    with pytest.raises(ValueError, match="these are q4_1; load them with dtype='bfloat16'"):
        upload(packed.weights)
    checkpoint = open_checkpoint(tiny_golden(NAMES[1]).folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="quantization must be None, int8 or int4"):
        upload(checkpoint.weights, "int3")
    with pytest.raises(ValueError, match=r"one of auto, .*fp8 on cuda, got 'int4'"):
        make_model(NAMES[1], kv_dtype="int4")


def test_a_failing_step_leaves_no_graph(rng, monkeypatch):
    model, cache = make_model(NAMES[1])
    prompts = prompts_of(NAMES[1], rng, [4])
    expected = generate(model, cache, prompts)
    model, cache = make_model(NAMES[1])
    real, calls = model.compute, []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the prompt, the step before the capture, the capture
            raise RuntimeError("no luck")
        real(*arguments)

    monkeypatch.setattr(model, "compute", fail_once)
    assert generate(model, cache, prompts) == expected  # the engine tries each sequence again
    assert len(calls) > 3
    assert generate(model, DeviceKVCache(
        model.config, num_blocks=cache.num_blocks, block_size=16, dtype="bfloat16"
    ), prompts) == expected  # fmt: skip


def test_the_room_for_partial_results_grows_with_the_cache(cuda):
    config = tiny_golden(NAMES[1]).model().config
    rows = config.n_heads * (config.head_dim + 4) * 4
    assert cuda_model.workspace_bytes(config, 0, 1) == (1 << 20) + rows * 2
    # 512 splits and a beginning of one, 32 nodes and a beginning of one
    assert cuda_model.workspace_bytes(config, 131_072, 1) == (1 << 20) + rows * (513 + 33)
    model, _ = make_model(NAMES[1], kv_memory=1 << 20, max_num_seqs=100)
    assert cuda.workspace() == model._workspace.pointer
    assert model._workspace.num_bytes == 4 << 20
    model, cache = make_model(NAMES[1], kv_memory=1 << 20, max_num_seqs=9000)
    num_keys = cache.num_blocks * cache.block_size
    assert model._workspace.num_bytes == cuda_model.workspace_bytes(config, num_keys, 9000)


def test_models_in_one_process_have_rooms_of_their_own(rng, cuda):
    prompts = prompts_of(NAMES[1], rng, [5])
    first, cache = make_model(NAMES[1])
    expected = generate(first, cache, prompts)
    second, other_cache = make_model(NAMES[1])
    assert cuda.workspace() == second._workspace.pointer
    assert generate(second, other_cache, prompts) == expected
    del second
    gc.collect()
    assert cuda.workspace() == 0
    assert generate(first, cache, prompts) == expected
    assert cuda.workspace() == first._workspace.pointer


def test_available_names_the_device():
    usable, text = ops.available("cuda")
    assert usable
    assert text
