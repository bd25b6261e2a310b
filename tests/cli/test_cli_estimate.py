"""`codellama-rt estimate`: memory and speed, of this machine or another, and what LLM then does."""

import contextlib
import json
import re

import pytest
from helpers.cli_calls import assert_one_line_error

import codellama_rt as clrt
from codellama_rt.llm import kv_plan, memory_plan
from codellama_rt.llm.memory_plan import estimate, find_model
from codellama_rt.llm.plan import Plan

ELSEWHERE = ("--memory", "80GB", "--bandwidth", "3350GB")


def test_a_name_is_enough(run):
    code, out, err = run("estimate", "CodeLlama-34b", "--batch", 2, *ELSEWHERE)
    assert (code, err) == (0, "")
    assert out.startswith("2 sequences of 16384 tokens, weights as stored, KV cache bfloat16\n")
    for words in (r"weights +67\.49 GB", r"KV cache +6\.44 GB", r"peak +74\.\d\d GB",
                  r"80\.0 GB are available; read at 3350\.0 GB/s",
                  r"int4 +int4 .* yes( +\d+\.\d){3}"):  # fmt: skip
        assert re.search(words, out), words


def test_what_does_not_fit_elsewhere(run):
    _, out, _ = run("estimate", "CodeLlama-70b", "--memory", "80GB", "--bandwidth", "2TB")
    lines = [line.split() for line in out.splitlines() if line.startswith(("as stored", "int4"))]
    assert {line[-4] for line in lines if line[0] == "as"} == {"no"}
    assert {line[-4] for line in lines if line[0] == "int4"} == {"yes"}


def test_json_has_bytes(run, model):
    code, out, _ = run("estimate", model, "--context", 256, "--kv-dtype", "int8", "--json")
    found = json.loads(out)
    expected = estimate(find_model(model), Plan(kv_dtype="int8"), context=256)
    assert code == 0
    assert found["available_bytes"] > 0 < found["read_bandwidth"]
    first = found["ways"][0]
    assert first["kv_dtype"] == "int8"
    assert first["peak_bytes"] == expected.peak
    assert first["figures"]["kv"] == expected.kv


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("CodeLlama-8b",), ["found no such file"]),
        (("CodeLlama-70b-Instruct", "--context", 16384), ["makes sense of 4096 tokens"]),
        (("CodeLlama-7b", "--context", 0), ["--context must be at least 1"]),
        (("CodeLlama-7b", "--batch", 0), ["--batch must be at least 1"]),
        (("CodeLlama-7b", "--quantization", "q4"), ["--quantization", "'q4' is not one of"]),
        (("CodeLlama-7b", "--kv-dtype", "fp8"), ["--kv-dtype must be one of"]),
        (("CodeLlama-7b", "--memory", "much"), ["--memory", "memory size", "much"]),
        (("CodeLlama-7b", "--device", "cuda"), ["--memory", "--bandwidth"]),
        (("CodeLlama-7b", "--device", "tpu"), ["--device", "tpu"]),
    ],
)
def test_a_mistake_in_one_line(run, args, words):
    assert_one_line_error(run("estimate", *args), *words)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_dtype": "int8"}])
def test_llm_opens_what_fits_and_refuses_what_does_not(model, monkeypatch, options):
    """At every amount of memory around the one that is just enough."""
    context = 4096
    figures = estimate(find_model(model), Plan(**options), context=context)
    around = range(figures.weights, 2 * figures.added, figures.added // 40)
    seen = set()
    for available in around:
        for module in (memory_plan, kv_plan):
            monkeypatch.setattr(module, "available_bytes", lambda amount=available: amount)
        opened = False
        with contextlib.suppress(RuntimeError):
            clrt.LLM(model, max_model_len=context, max_num_seqs=1, **options).close()
            opened = True
        seen.add((figures.fits(available), opened))
    assert (True, False) not in seen
    assert {(True, True), (False, False)} <= seen
