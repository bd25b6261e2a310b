"""LLM's prefix cache as its callers see it: an editor's session, salts, resets."""

import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3)
BEFORE = "def add(first, second):\n    " + "# a sum of two numbers\n    " * 3
AFTER = "\n\nfor number in range(10):\n    print(number)\n"
TYPED = "return first + second"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


def filled(llm, typed, **options):
    return llm.infill(BEFORE + typed, AFTER, PARAMS, **options)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("suffix_first", [True, False])
def test_typing_finds_all_but_the_last_tokens_and_changes_no_bit(folder, kv_dtype, suffix_first):
    options = {"kv_memory": KV_MEMORY, "kv_dtype": kv_dtype}
    with LLM(folder, **options) as llm, LLM(folder, **options, prefix_caching=False) as plain:
        for stop in range(0, len(TYPED), 3):
            found = filled(llm, TYPED[:stop], suffix_first=suffix_first)
            expected = filled(plain, TYPED[:stop], suffix_first=suffix_first)
            assert found.token_ids == expected.token_ids
            assert found.logprobs == expected.logprobs
            computed = found.stats["prompt_tokens"] - found.stats["cached_tokens"]
            assert expected.stats["cached_tokens"] == 0
            if stop:
                suffix = len(llm.tokenizer.encode_continuation(AFTER))
                assert computed <= 5 if suffix_first else suffix < computed <= suffix + 6
        assert llm.engine.stats()["prefix_partial_hit_tokens"] > 0


def test_salts_and_resets(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as llm:

        def cached(**options):
            return filled(llm, TYPED, **options).stats["cached_tokens"]

        assert cached() == 0
        assert cached(cache_salt="a") == 0
        whole = cached()
        assert whole == cached(cache_salt="a") > 0
        assert llm.reset_prefix_cache()
        assert cached(cache_salt="a") == 0
        assert llm.generate(TYPED, PARAMS, cache_salt="b")[0].stats["cached_tokens"] == 0
        assert llm.generate(TYPED, PARAMS, cache_salt="b")[0].stats["cached_tokens"] > 0
        stream = llm.stream(TYPED, PARAMS, cache_salt="c")
        next(stream)
        assert not llm.reset_prefix_cache()  # the stream holds blocks
        stream.close()
        with pytest.raises(ValueError, match="cache_salt must not be empty"):
            llm.generate(TYPED, PARAMS, cache_salt="")
