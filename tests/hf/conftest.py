"""One small model for all tests of the Transformers surface."""

import mindspore as ms
import pytest
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("causal_lm") / "model")
    made = clrt.LlamaForCausalLM.from_pretrained(folder, kv_memory=KV_MEMORY, dtype=ms.float32)
    with made.llm:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    yield
    if "model" in request.fixturenames:
        stats = request.getfixturevalue("model").llm.engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"]
