"""Whole tiny checkpoints on the emulated device, beside the CPU device in float16."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.builders import normal
from helpers.goldens import make_engine, run, tiny_golden

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.llama import Llama

pytestmark = pytest.mark.usefixtures("device")
# Logits up to 10 with float16 activations throughout, against float32 ones: their own rounding is
# 0.004, the rest is that of three layers.
LOGITS_ATOL = 0.05


def checkpoint_of(name):
    return open_checkpoint(tiny_golden(name).folder, dtype="float16")


def ascend_llama(checkpoint, **options):
    from codellama_rt.model.ascend.llama import AscendLlama

    return AscendLlama(checkpoint.config, checkpoint.weights, **options)


def ascend_engine(model, **options):
    from codellama_rt.model.ascend.llama import AscendKVCache

    options = {"max_model_len": 400, **options}
    return Engine(model, AscendKVCache(model.config, num_blocks=8), **options)


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [("mqa_fp16_sharded", 48), ("gqa_theta1e6_bf16", 16), ("hd128_gqa_bf16", 24),
     ("rope_dynamic2", 8)],
)  # fmt: skip
def test_greedy_tokens_are_those_of_the_cpu(name, max_tokens):
    """All prompts together; up to the step where the golden's two best tokens are too close."""
    golden, checkpoint = tiny_golden(name), checkpoint_of(name)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = [case["prompt"] for case in golden.cases]
    tokens = run(ascend_engine(ascend_llama(checkpoint)), prompts, params)
    cpu = Llama(checkpoint.config, checkpoint.weights)
    expected = run(make_engine(cpu, kv_dtype="float16"), prompts, params)
    compared = 0
    for case, ours, theirs in zip(golden.cases, tokens, expected, strict=True):
        low_margin = case["first_low_margin_step"]
        steps = max_tokens if low_margin is None else min(low_margin, max_tokens)
        assert ours[:steps] == theirs[:steps]
        compared += steps
    assert compared >= max_tokens, "too few steps to prove anything"


def test_chunks_preemption_and_shared_prefixes():
    """The engine's ways on this device: tokens do not depend on them."""
    checkpoint = checkpoint_of("mqa_fp16_sharded")
    model = ascend_llama(checkpoint)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompt = tiny_golden("mqa_fp16_sharded").cases[3]["prompt"] + [9] * 20
    prompts = [prompt, [*prompt[:130], 5], prompt[:7]]
    expected = [run(ascend_engine(model), [p], params)[0] for p in prompts]
    engine = ascend_engine(model, max_num_batched_tokens=50)
    assert run(engine, prompts, params) == expected


def test_logits_are_near_those_of_the_cpu():
    from codellama_rt.llm.scoring import sequence_logits
    from codellama_rt.model.ascend.llama import AscendKVCache

    checkpoint = checkpoint_of("gqa_theta1e6_bf16")
    prompt = tiny_golden("gqa_theta1e6_bf16").cases[2]["prompt"]
    model = ascend_llama(checkpoint)
    assert model.kv_cache_type is AscendKVCache
    far = 99_000
    logits = sequence_logits(model, prompt, first_position=far, kv_dtype="float16")
    cpu = Llama(checkpoint.config, checkpoint.weights)
    expected = sequence_logits(cpu, prompt, first_position=far, kv_dtype="float16")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)


def test_a_step_without_logits():
    checkpoint = checkpoint_of("mqa_fp16_sharded")
    engine = ascend_engine(ascend_llama(checkpoint), max_num_batched_tokens=4)
    params = SamplingParams(max_tokens=1)
    assert len(run(engine, [[5] * 9], params)[0]) == 1


def test_copied_pages_hold_the_same(rng):
    from codellama_rt.model.ascend.llama import AscendKVCache

    config = checkpoint_of("mqa_fp16_sharded").config
    kv_cache = AscendKVCache(config, num_blocks=4)
    pages = [normal(rng, cache.shape, "float16") for cache in kv_cache.layers[0]]
    import mindspore

    for cache, page in zip(kv_cache.layers[0], pages, strict=True):
        cache[:] = mindspore.Tensor(page)
    pointers = [cache.data_ptr() for cache in kv_cache.layers[0]]
    kv_cache.copy_blocks(np.array([[0, 2], [2, 3]], np.int32))  # one after the other
    for cache, page in zip(kv_cache.layers[0], pages, strict=True):
        np.testing.assert_array_equal(cache.asnumpy(), page[[0, 1, 0, 0]])
    assert [cache.data_ptr() for cache in kv_cache.layers[0]] == pointers
    assert kv_cache.num_bytes == sum(c.nbytes for caches in kv_cache.layers for c in caches)


def test_what_the_device_does_not_take_is_refused():
    from codellama_rt.model.ascend.llama import AscendKVCache, AscendLlama

    checkpoint = checkpoint_of("mqa_fp16_sharded")
    config, weights = checkpoint.config, checkpoint.weights
    with pytest.raises(ValueError, match="attention must be 'custom' or 'vendor', got 'flash'"):
        AscendLlama(config, weights, attention="flash")
    with pytest.raises(ValueError, match="halves, not interleaved pairs"):
        AscendLlama(replace(config, rope_interleaved=True), weights)
    stored = open_checkpoint(tiny_golden("mha_theta1e4_fp32").folder)
    with pytest.raises(ValueError, match="embedding is float32; use dtype='float16'"):
        AscendLlama(stored.config, stored.weights)
    with pytest.raises(ValueError, match="kv_dtype must be float16 or bfloat16, got 'float32'"):
        AscendKVCache(config, num_blocks=1, dtype="float32")
    with pytest.raises(ValueError, match="block_size a positive multiple of 16, got 1 and 24"):
        AscendKVCache(config, num_blocks=1, block_size=24)


@pytest.mark.parametrize("block_size", [64, None])
def test_llm(block_size):
    from codellama_rt.llm.llm import LLM

    golden = tiny_golden("mqa_fp16_sharded")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompt = golden.cases[2]["prompt"]
    with LLM(
        golden.folder, device="ascend", block_size=block_size, max_model_len=200, max_num_seqs=2
    ) as llm:
        assert llm.generate([prompt], params)[0].token_ids == golden.cases[2]["greedy_no_eos"][:8]
        assert llm.logits(prompt).shape == (len(prompt), 512)
        assert llm.kv_cache.block_size == (block_size or 128)


def test_a_pool_for_vendor_attention_stays_within_its_offsets(monkeypatch):
    """32 bits reach 524,160 tokens of Code Llama 7B; here a tiny model's tokens, by fewer bits."""
    from codellama_rt.llm.llm import LLM
    from codellama_rt.model.ascend import vendor as ascend_vendor

    folder = tiny_golden("mqa_fp16_sharded").folder
    config = checkpoint_of("mqa_fp16_sharded").config
    page = config.n_kv_heads * 128 * config.head_dim
    monkeypatch.setattr(ascend_vendor, "MAX_ELEMENTS", 4 * page - 1)
    options = {"device": "ascend", "kv_memory": "1GB"}
    with LLM(folder, attention="vendor", max_model_len=384, **options) as llm:
        assert llm.kv_cache.num_blocks == 3
    with LLM(folder, max_model_len=400, **options) as llm:  # our kernels' offsets have 64 bits
        assert llm.kv_cache.num_blocks > 3
    with pytest.raises(ValueError, match=r"'vendor' reaches 384 tokens .* not max_model_len=385; "):
        LLM(folder, attention="vendor", max_model_len=385, **options)


def test_an_attention_of_another_device_is_refused():
    from codellama_rt.llm.llm import LLM

    with pytest.raises(ValueError, match="attention='vendor' is there on Ascend, not on device"):
        LLM(tiny_golden("mqa_fp16_sharded").folder, attention="vendor", max_model_len=64)
