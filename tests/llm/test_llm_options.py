"""LLM: what its options, its checkpoint's generation_config.json and its closing change."""

import pytest
from helpers.builders import running_on
from helpers.goldens import tiny_golden
from helpers.tiny_llm import KV_MEMORY, NAME, make_folder
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM

PROMPT = "def add(first, second):"
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_options_change_no_bit(folder, prefix_caching):
    """A second run, which may find its prompt cached, against a first with the defaults."""
    ids = tiny_golden(NAME).cases[3]["prompt"]
    params = SamplingParams(max_tokens=20, prompt_logprobs=0)
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        expected, logits = llm.generate(ids, params)[0], llm.logits(ids)
    for threads, block_size, budget in [(1, 16, 16), (2, 64, 512)]:
        with running_on(), LLM(
            folder, kv_memory=KV_MEMORY, num_threads=threads, block_size=block_size,
            max_num_batched_tokens=budget, prefix_caching=prefix_caching,
        ) as llm:  # fmt: skip
            assert ops.num_threads() == threads
            llm.generate(ids, params)
            again = llm.generate(ids, params)[0]
            assert again.token_ids == expected.token_ids
            assert list(again.prompt_logprobs) == list(expected.prompt_logprobs)
            assert_equal_bits(llm.logits(ids), logits)
            assert llm.engine.stats()["prefix_hit_tokens"] == 0  # every logit was asked for
            llm.generate(ids)
            assert (llm.engine.stats()["prefix_hit_tokens"] > 0) is prefix_caching


def test_dtypes_of_weights_and_cache(folder):
    ids = tiny_golden(NAME).cases[0]["prompt"]
    expected = tiny_golden(NAME).cases[0]["greedy_no_eos"]
    with LLM(folder, dtype="float32", kv_memory=KV_MEMORY) as llm:
        assert llm.kv_cache.dtype == llm.config.dtype == "float32"
        params = SamplingParams(max_tokens=48, ignore_eos=True)
        assert llm.generate(ids, params)[0].token_ids == expected
    with LLM(folder, kv_dtype="float16", kv_memory=KV_MEMORY) as llm:
        assert (llm.config.dtype, llm.kv_cache.dtype) == ("bfloat16", "float16")
        assert len(llm.generate(ids, SHORT)[0].token_ids) == 8


def test_progress_counts_every_byte(folder):
    seen = []
    with LLM(folder, dtype="float32", kv_memory=KV_MEMORY, progress=lambda *a: seen.append(a)):
        done, total, _ = zip(*seen, strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == total[-1] > 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, SamplingParams()),
        ({"temperature": 0.7, "top_p": 0.9}, SamplingParams()),  # of no use without do_sample
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "min_p": 0.05},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=7, min_p=0.05),
        ),
        (
            {"repetition_penalty": 1.1, "max_new_tokens": 9, "top_k": None},
            SamplingParams(repetition_penalty=1.1, max_tokens=9),
        ),
    ],
)
def test_generation_config(tmp_path, config, expected):
    folder = make_folder(tmp_path / "model", generation_config=config)
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        assert llm.default_params() == expected


def test_generation_config_is_used_and_arguments_win(tmp_path):
    first = tiny_golden(NAME).cases[0]["greedy_no_eos"][0]
    config = {"max_new_tokens": 5, "eos_token_id": [first, 2]}
    folder = make_folder(tmp_path / "model", generation_config=config)
    with LLM(folder, dtype="float32", kv_memory=KV_MEMORY) as llm:
        assert llm.generate([1])[0].token_ids == [first]
        assert (
            len(llm.generate([1], SamplingParams(max_tokens=7, ignore_eos=True))[0].token_ids) == 7
        )


def test_without_a_tokenizer(tmp_path):
    folder = make_folder(tmp_path / "model", tokenizer=False)
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        assert llm.tokenizer is None
        (completion,) = llm.generate([1, 5, 9], SHORT)
        assert len(completion.token_ids) == 8
        assert completion.text == ""
        for use in (lambda: llm.generate("text"), lambda: llm.infill("a", "b")):
            with pytest.raises(ValueError, match="no tokenizer; give prompts as token ids"):
                use()


def test_closed(folder):
    llm = LLM(folder, kv_memory=KV_MEMORY)
    stream = llm.stream(PROMPT, SHORT)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPT)
    assert not llm.engine.has_unfinished()


def test_context_of_more_than_the_checkpoint_says(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        assert llm.max_model_len == llm.config.max_position_embeddings == 16384
    with LLM(folder, kv_memory="64MB", max_model_len=100_000) as llm:
        assert llm.engine.admission.max_model_len == 100_000
        assert llm.kv_cache.num_blocks * llm.kv_cache.block_size >= 100_000
