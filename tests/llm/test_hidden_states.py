"""Hidden states and embeddings: those of Transformers, whatever the chunks and the padding."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.tiny_llm import make_folder

import codellama_rt as clrt

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference" / "hidden_states"
OPTIONS = {"dtype": "float32", "kv_memory": 2**20, "max_model_len": 64}


@pytest.fixture(scope="module")
def golden():
    with np.load(REFERENCE / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def llm():
    with clrt.LLM(REFERENCE, **OPTIONS) as llm:
        yield llm


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("chunk", [512, 3])
def test_hidden_states_are_those_of_transformers(golden, i, chunk):
    with clrt.LLM(REFERENCE, **OPTIONS, max_num_batched_tokens=chunk) as llm:
        found = llm.hidden_states(golden[f"prompt_{i}"].tolist())
    expected = golden[f"hidden_{i}"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


def test_logits_and_hidden_states_do_not_disturb_one_another(llm, golden):
    ids = golden["prompt_1"].tolist()
    logits = llm.logits(ids)
    states = llm.hidden_states(ids)
    assert (llm.logits(ids) == logits).all()
    assert (llm.hidden_states(ids) == states).all()
    head = llm.model.weights.lm_head.astype(np.float64)
    assert np.abs(states[-1] @ head.T - logits).max() < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings(llm, golden, pooling, normalize):
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(2)]
    found = llm.embed(prompts, pooling=pooling, normalize=normalize)
    for vector, states in zip(found, (golden["hidden_0"], golden["hidden_1"]), strict=True):
        expected = states[-1, -1] if pooling == "last" else states[-1].mean(axis=0)
        if normalize:
            expected = expected / np.linalg.norm(expected)
            assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)
        assert np.abs(vector - expected).max() < 1e-5
    assert (llm.embed(prompts[1], pooling=pooling, normalize=normalize)[0] == found[1]).all()


def test_texts_and_adapters_have_embeddings(tmp_path):
    with clrt.LLM(make_folder(tmp_path / "m"), kv_memory=2**22) as llm:
        ids = llm.tokenizer.encode("def f():")
        plain = llm.embed("def f():")
        assert (plain == llm.embed([ids])).all()
        assert plain.shape == (1, llm.config.dim)
        adapter = llm.load_adapter(write_adapter(tmp_path / "a", llm.config))
        assert (llm.embed(ids, adapter=adapter) != plain).any()


def test_the_surface_of_transformers(llm, golden):
    model = clrt.LlamaForCausalLM(llm)
    ids = golden["prompt_1"]
    padded = np.stack([ids, np.r_[np.zeros(5, ids.dtype), ids[:-5]]])
    mask = np.ones_like(padded)
    mask[1, :5] = 0
    output = model(ms.Tensor(padded), attention_mask=ms.Tensor(mask), output_hidden_states=True)
    states = np.stack([tensor.asnumpy() for tensor in output.hidden_states])
    assert states.shape == (3, 2, 20, 64)
    assert np.abs(states[:, 0] - golden["hidden_1"]).max() < 1e-5
    assert np.abs(states[:, 1, 5:] - golden["hidden_1"][:, :15]).max() < 1e-5
    assert not states[:, 1, :5].any()
    assert model(ms.Tensor(padded)).hidden_states is None


def test_embeddings_that_cannot_be(llm):
    with pytest.raises(ValueError, match="pooling must be 'last' or 'mean', got 'max'"):
        llm.embed([[1, 5]], pooling="max")
    with pytest.raises(ValueError, match=r"at least one token|empty"):
        llm.embed([[]])
    with pytest.raises(ValueError, match="token"):
        llm.hidden_states([64])
    with pytest.raises(ValueError, match="brings no tokenizer"):
        llm.embed("text")
    assert llm.embed([]).shape == (0, 64)
    with (
        clrt.LLM(REFERENCE, **OPTIONS, runtime="graph") as graph,
        pytest.raises(ValueError, match="device='cpu' with runtime='direct' only"),
    ):
        graph.embed([[1]])
