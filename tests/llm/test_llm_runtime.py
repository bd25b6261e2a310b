"""LLM: runtime="graph", the model as a MindSpore cell, gives the bits of direct calls."""

import os
import sys

import pytest
from helpers.adapter_files import write_adapter
from helpers.goldens import tiny_golden
from helpers.tiny_llm import KV_MEMORY, NAME, make_folder
from helpers.tolerances import assert_equal_bits

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm import placement
from codellama_rt.llm.llm import LLM

needs_mindspore = pytest.mark.skipif(
    placement.find_spec("mindspore") is None, reason="MindSpore is not installed"
)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


@needs_mindspore
@pytest.mark.filterwarnings("ignore:MindSpore is imported already")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {}),
        (NAME, {"quantization": "int8"}),
        ("hd128_gqa_bf16", {"quantization": "int8", "kv_dtype": "int8"}),
    ],
    ids=["as_stored", "int8", "int8_cache"],
)
def test_graph_and_direct_calls_agree_to_the_bit(tmp_path, name, options):
    folder = make_folder(tmp_path / "model", name=name, tokenizer=False)
    prompts = [case["prompt"] for case in tiny_golden(name).cases[:3]]
    found = {}
    for runtime in placement.RUNTIMES:
        with LLM(
            folder, runtime=runtime, kv_memory=KV_MEMORY, max_num_batched_tokens=16, **options
        ) as llm:
            completions = llm.generate(prompts, GREEDY)
            found[runtime] = [c.token_ids for c in completions], llm.logits(prompts[0])
            assert type(llm.model).__name__ == {"direct": "Llama", "graph": "LlamaCell"}[runtime]
    assert found["graph"][0] == found["direct"][0]
    assert_equal_bits(found["graph"][1], found["direct"][1])


@needs_mindspore
@pytest.mark.filterwarnings("ignore:MindSpore is imported already")
def test_adapters_of_single_requests_need_direct_calls(folder, tmp_path):
    with LLM(folder, runtime="graph", kv_memory=KV_MEMORY) as llm:
        adapter = llm.load_adapter(write_adapter(tmp_path / "adapter", llm.config))
        with pytest.raises(ValueError, match=r"need device='cpu' and runtime='direct'; elsewhere"):
            llm.generate("def f(", GREEDY, adapter=adapter)


def test_other_runtimes_are_rejected():
    with pytest.raises(ValueError, match="runtime must be one of direct, graph, got 'eager'"):
        placement.require_runtime("eager", "cpu")
    for device in ("cuda", "ascend"):
        with pytest.raises(ValueError, match=f"on device 'cpu' only, got device '{device}'"):
            placement.require_runtime("graph", device)


def test_the_graph_needs_mindspore(folder, monkeypatch):
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="runtime='graph' needs MindSpore"):
        LLM(folder, runtime="graph", kv_memory=KV_MEMORY)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "graph_pipeline:false"),
        ("inline:true", "inline:true,graph_pipeline:false"),
        ("graph_pipeline:true", "graph_pipeline:true"),
    ],
)
def test_the_pipeline_is_off_unless_asked_for(monkeypatch, before, after):
    monkeypatch.delitem(sys.modules, "mindspore", raising=False)
    monkeypatch.setenv("MS_DEV_RUNTIME_CONF", before)
    placement._keep_the_pipeline_off()
    assert os.environ["MS_DEV_RUNTIME_CONF"] == after


def test_too_late_for_the_setting_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mindspore", object())
    monkeypatch.delenv("MS_DEV_RUNTIME_CONF", raising=False)
    with pytest.warns(UserWarning, match=r"set MS_DEV_RUNTIME_CONF=graph_pipeline:false"):
        placement._keep_the_pipeline_off()
