"""Whole prompts from measured chunks: the sums, on figures that are made up."""

import json
import sys

import bench_prefill
import numpy as np
import pytest
from bench_prefill import CHUNK, Part, prompt_row

from codellama_rt import ops
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench.op_cases import Selection

LAYERS = SHAPES["7b"].n_layers
PRODUCTS = Part(np.array([0.5, 0.0]), np.array([8e9, 0.0]), "vdpbf16ps", 32e9, 0.01)
ATTENDING = Part(np.array([0.1, 1e-4]), np.array([0.0, 2e6]), "vpdpbusd", 64e9, 0.02)


def test_a_prompt_is_the_sum_of_its_chunks():
    row = prompt_row("7b", 2 * CHUNK, "bfloat16", "int8", PRODUCTS, ATTENDING)
    attention = 0.1 + 1e-4 * 512 + 0.1 + 1e-4 * 1024
    assert row["seconds"] == pytest.approx(LAYERS * (2 * 0.5 + attention))
    assert row["attention_share"] == pytest.approx(attention / (1 + attention))
    assert row["tokens_per_s"] == pytest.approx(1024 / row["seconds"])
    assert row["limit_seconds"] == pytest.approx(LAYERS * (2 * 0.25 + 2e6 * (512 + 1024) / 64e9))
    assert row["share"] == pytest.approx(row["limit_seconds"] / row["seconds"])
    assert row["linear_gflop_per_s"] == pytest.approx(16)
    assert (row["linear_instruction"], row["attention_instruction"]) == ("vdpbf16ps", "vpdpbusd")
    assert row["roof_drift"] == 0.02


def test_a_last_chunk_counts_by_its_share():
    one, two = (
        prompt_row("7b", n * CHUNK, "int8", "int8", PRODUCTS, ATTENDING)["seconds"] for n in (1, 2)
    )
    half = prompt_row("7b", CHUNK * 3 // 2, "int8", "int8", PRODUCTS, ATTENDING)["seconds"]
    last = LAYERS * (0.5 + 0.1 + 1e-4 * CHUNK * 3 / 2)
    assert half == pytest.approx(one + last / 2)
    assert one < half < two


def test_attention_is_a_line_through_its_depths(monkeypatch):
    monkeypatch.setattr(bench_prefill, "peak", lambda dtype: ("vpdpbusd", 1e12))
    monkeypatch.setattr(
        bench_prefill, "_time", lambda case, repeats: 0.25 + 1e-6 * case.sizes.get("num_keys", 0)
    )
    part = bench_prefill.attention("7b", "int8", [4096, 8192, 32768], 1)
    np.testing.assert_allclose(part.seconds, [0.25, 1e-6])
    (case,) = Selection(["paged_attention"], ["7b"], ["int8"], [CHUNK], [100_000]).cases()
    np.testing.assert_allclose(part.flops @ [1, 100_000], case.flops)  # far outside the depths
    products = bench_prefill.linears("7b", "int4", 1)
    assert products.seconds[1] == 0.0
    config = SHAPES["7b"]
    weights = config.dim * (4 * config.dim + 3 * config.hidden_dim)
    assert products.flops[0] == 2 * CHUNK * weights  # all of a layer, without the head


def test_the_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_prefill, "_time", lambda case, repeats: 1e3)
    file, before = tmp_path / "rows.json", ops.isa()
    words = ["--quick", "--weights", "bfloat16,int4", "--kv-dtype", "int8", "--isa", "baseline"]
    monkeypatch.setattr(sys, "argv", ["bench_prefill.py", *words, "--json", str(file)])
    monkeypatch.setattr(bench_prefill, "drift", lambda before, after: 0.0)
    bench_prefill.main()
    record = json.loads(file.read_text())
    assert [(row["weights"], row["tokens"]) for row in record["rows"]] == [
        ("bfloat16", 1024), ("bfloat16", 2048), ("int4", 1024), ("int4", 2048),
    ]  # fmt: skip
    assert {row["isa"] for row in record["rows"]} == {"baseline"}
    assert ops.isa() == before
    assert "Whole prompts, summed from chunks: tiny, baseline" in capsys.readouterr().out


@pytest.mark.parametrize("depths", ["4096", "256,4096"])
def test_depths_that_give_no_line_are_refused(depths, capsys):
    with pytest.raises(SystemExit):
        bench_prefill.parse(["--depths", depths])
    assert "--depths must be at least two, of at least 512 tokens" in capsys.readouterr().err
