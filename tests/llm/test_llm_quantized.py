"""LLM with quantised weights and KV caches: no option changes a bit, and what is refused."""

import numpy as np
import pytest
from helpers.builders import running_on
from helpers.checkpoint_files import write_mini
from helpers.goldens import make_engine, run, tiny_golden
from helpers.quantized_models import floats, projections
from helpers.tiny_llm import KV_MEMORY, make_folder
from helpers.tolerances import assert_equal_bits

import codellama_rt as clrt
from codellama_rt.cli.run import describe, follow
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm import memory_plan
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory_plan import weight_bytes
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.tools.convert.convert import convert

NAME = "mqa_fp16_sharded"  # heads of 32, as an int4 cache wants them
PROMPT = "def add(first, second):"
COMBINATIONS = [(None, "int8"), (None, "int4"), ("int8", "auto"), ("int4", "auto"),
                ("int8", "int8"), ("int4", "int4")]  # fmt: skip
# Mean error of a tiny random model's logits, by their spread: at most about twice what was seen.
LOGIT_ERROR = {"int8": 0.1, "int4": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model", name=NAME)


@pytest.mark.parametrize(("quantization", "kv_dtype"), COMBINATIONS)
def test_options_change_no_bit(folder, quantization, kv_dtype):
    """Threads, blocks, chunks, a prompt found cached; and a converted file against the original."""
    ids = tiny_golden(NAME).cases[3]["prompt"]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    options = {"kv_memory": KV_MEMORY, "kv_dtype": kv_dtype}
    with LLM(folder, quantization=quantization, **options) as llm:
        expected, logits = llm.generate(ids, params)[0].token_ids, llm.logits(ids)
        assert llm.kv_cache.dtype == ("float16" if kv_dtype == "auto" else kv_dtype)
    for threads, block_size, budget in [(1, 16, 16), (2, 64, 512)]:
        with running_on(), LLM(
            folder, quantization=quantization, num_threads=threads, block_size=block_size,
            max_num_batched_tokens=budget, **options,
        ) as llm:  # fmt: skip
            assert llm.generate([ids, ids[:9], ids], params)[0].token_ids == expected
            assert llm.generate(ids, params)[0].token_ids == expected
            assert llm.engine.stats()["prefix_hit_tokens"] > 0
            assert_equal_bits(llm.logits(ids), logits)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_converted_checkpoint_gives_the_same_bits(folder, tmp_path, quantization):
    converted = convert(folder, tmp_path / "out", quantization=quantization)
    ids = tiny_golden(NAME).cases[3]["prompt"]
    with LLM(folder, quantization=quantization, kv_memory=KV_MEMORY) as llm:
        logits, text = llm.logits(ids), llm.generate(PROMPT)[0].text
    with LLM(converted, kv_memory=KV_MEMORY) as llm:
        assert llm.kv_cache.dtype == "float16"
        assert_equal_bits(llm.logits(ids), logits)
        assert llm.generate(PROMPT)[0].text == text
    with pytest.raises(ValueError, match=f"found them in {quantization} already"):
        LLM(converted, quantization="int4" if quantization == "int8" else "int8")


@pytest.mark.parametrize("where", ["weights", "cache"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", [NAME, "hd128_gqa_bf16", "gqa_theta1e6_bf16", "tied_fp32"])
def test_logits_are_near_those_in_float32(name, where, dtype):
    golden = tiny_golden(name)
    if (where, dtype) == ("cache", "int4") and golden.model().config.head_dim < 32:
        pytest.skip("an int4 cache takes heads of a multiple of 32")
    quantization, kv_dtype = (dtype, "float32") if where == "weights" else (None, dtype)
    model = golden.model("float32", quantization)
    for i, case in enumerate(golden.cases):
        positions, expected = golden.logits(i)
        logits = sequence_logits(model, case["prompt"], kv_dtype=kv_dtype)[positions]
        error = np.abs(logits - expected).mean() / np.std(expected)
        assert error <= LOGIT_ERROR[dtype], error


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_samples_share_pages_until_they_differ(kv_dtype):
    """Copy-on-write and preemption in few blocks, against one sample at a time in many."""
    model = tiny_golden(NAME).model()
    prompt = tiny_golden(NAME).cases[3]["prompt"][:40]
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.9, seed=3, n=3)

    def samples(num_blocks, **options):
        engine = make_engine(model, num_blocks=num_blocks, kv_dtype=kv_dtype, **options)
        engine.add_request("r", prompt, params)
        token_ids = {}
        while engine.has_unfinished():
            for output in engine.step():
                token_ids.setdefault(output.index, []).extend(output.token_ids)
        return token_ids, engine.stats()

    expected, _ = samples(64, max_num_seqs=1)
    found, stats = samples(8)
    assert found == expected
    assert len({tuple(ids) for ids in found.values()}) == 3
    assert stats["preemptions"] > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_greedy_tokens_do_not_depend_on_the_batch(kv_dtype):
    golden = tiny_golden(NAME)
    model, prompts = golden.model(), [case["prompt"] for case in golden.cases]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    alone = [run(make_engine(model, kv_dtype=kv_dtype), [p], params)[0] for p in prompts]
    together = make_engine(model, kv_dtype=kv_dtype, max_num_batched_tokens=50)
    assert run(together, prompts, params) == alone


def test_progress_counts_every_byte_that_is_quantised(folder):
    seen = []
    with LLM(
        folder, quantization="int4", kv_memory=KV_MEMORY, progress=lambda *call: seen.append(call)
    ) as llm:
        done, totals, what = zip(*seen, strict=True)
        embedding = llm.model.weights.embedding.nbytes
        norms = (2 * llm.config.n_layers + 1) * llm.config.dim * 2
        assert done[-1] == totals[-1] == llm.stored_bytes - embedding - norms
    assert list(done) == sorted(done)
    assert set(what) == {"quantising to int4"}


def test_the_plan_leaves_out_what_the_weights_will_take(folder, monkeypatch):
    """It is made before any of them is in memory, mapped or made."""
    seen = []
    plan = memory_plan.plan_num_blocks

    def remember(config, asked, weight_bytes):
        seen.append(weight_bytes)
        return plan(config, asked, weight_bytes)

    monkeypatch.setattr(memory_plan, "plan_num_blocks", remember)
    for quantization in (None, "int4"):
        LLM(folder, quantization=quantization, kv_memory=KV_MEMORY).close()
    whole, rest = seen
    with LLM(folder, quantization="int4", kv_memory=KV_MEMORY) as llm:
        weights = llm.model.weights
        assert whole == llm.stored_bytes
        assert rest == sum(a.nbytes for a in [*projections(weights), *floats(weights)])


def test_stats_count_quantised_bytes(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as whole, LLM(
        folder, quantization="int4", kv_dtype="int4", kv_memory=KV_MEMORY
    ) as llm:  # fmt: skip
        assert weight_bytes(llm.model.weights) < 0.4 * weight_bytes(whole.model.weights)
        assert bytes_per_token(llm.config, "int4") < bytes_per_token(llm.config, "bfloat16")
        report = follow(llm, [1, 5, 6], SamplingParams(max_tokens=4), lambda text: None)
        assert "GB/s" in describe(llm, report)


@pytest.mark.parametrize("name", ["generate", "LlamaForCausalLM"])
def test_the_options_reach_every_door(folder, name):
    ids = tiny_golden(NAME).cases[0]["prompt"]
    options = {"quantization": "int8", "kv_dtype": "int4", "kv_memory": KV_MEMORY}
    with LLM(folder, **options) as llm:
        (expected,) = llm.generate([ids], SamplingParams(max_tokens=12))
    if name == "generate":
        assert clrt.generate(folder, [ids], max_new_tokens=12, **options) == [expected.text]
        return
    model = clrt.LlamaForCausalLM.from_pretrained(folder, **options)
    assert model.llm.kv_cache.dtype == "int4"
    assert model.llm.model.weights.lm_head.dtype == "int8"
    model.llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int2"}, "quantization must be None or one of int8, int4, got 'int2'"),
        ({"quantization": "q4_0"}, "quantization must be None or one of int8, int4, got 'q4_0'"),
        ({"quantization": 4}, "quantization must be None or one of int8, int4, got 4"),
        ({"kv_dtype": "int2"}, "kv_dtype must be one of auto, .*int8, int4, got 'int2'"),
        ({"kv_dtype": "q8_0"}, "kv_dtype must be one of auto, .*int8, int4, got 'q8_0'"),
    ],
)
def test_what_there_is_not(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **options)


def test_heads_too_small_for_int4(tmp_path):
    write_mini(tmp_path / "model")  # heads of 4
    with pytest.raises(
        ValueError, match=r"int4 cache must have head_dim .* got 4; use kv_dtype='int8'"
    ):
        LLM(tmp_path / "model", kv_dtype="int4")
    with LLM(tmp_path / "model", kv_dtype="int8", quantization="int4", kv_memory=KV_MEMORY) as llm:
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=5))[0].token_ids) == 5


def test_a_refusal_names_the_dtype_that_fits(folder):
    with pytest.raises(RuntimeError, match=r"100000 tokens takes .* in float16.*kv_dtype='int4'"):
        LLM(folder, max_model_len=100_000, kv_memory="20MB")
