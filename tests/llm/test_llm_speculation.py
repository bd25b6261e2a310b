"""LLM(speculation="suffix") on each runtime and with adapters: the tokens are those without it."""

import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.speculating import propose_right_and_wrong
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm import placement
from codellama_rt.llm.llm import LLM

PROMPTS = ["def f(", "class A:\n    def"]
PARAMS = [
    SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2, temperature=0.8, seed=4),
]
needs_mindspore = pytest.mark.skipif(
    placement.find_spec("mindspore") is None, reason="MindSpore is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


def found(folder, adapter, expected=None, **options):
    """Tokens and log-probabilities; proposals are right or wrong by those expected."""
    kind = {} if expected is None else {"speculation": "suffix"}
    with LLM(folder, kv_memory=KV_MEMORY, max_num_batched_tokens=64, **kind, **options) as llm:
        if expected is not None:
            rng = np.random.default_rng(0)
            propose_right_and_wrong(llm.engine, rng, lambda one: expected[one.order[1]][0])
        used = None if adapter is None else llm.load_adapter(adapter)
        completions = llm.generate(PROMPTS, PARAMS, adapter=used)
        stats = llm.engine.stats()
        assert (stats["accepted_tokens"] > 0) == (expected is not None)
        assert (stats["draft_tokens"] > stats["accepted_tokens"]) == (expected is not None)
        return [(one.token_ids, one.logprobs) for one in completions]


@pytest.mark.parametrize("has_adapter", [False, True])
def test_direct_calls(folder, tmp_path, has_adapter):
    adapter = None
    if has_adapter:
        with LLM(folder, kv_memory=KV_MEMORY) as llm:
            adapter = write_adapter(tmp_path / "adapter", llm.config)
    expected = found(folder, adapter)
    assert found(folder, adapter, expected) == expected


@needs_mindspore
@pytest.mark.filterwarnings("ignore:MindSpore is imported already")
def test_graphs(folder):
    expected = found(folder, None)
    assert found(folder, None, expected, runtime="graph") == expected


def test_another_kind_is_refused(folder):
    with pytest.raises(ValueError, match="speculation must be None or one of"):
        LLM(folder, kv_memory=KV_MEMORY, speculation="draft")
