"""The benchmark suite: it covers every operator, runs end to end at tiny sizes, and reports.

What it measures is not asserted: speed belongs to the machine.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.huge_pages import advised_huge_pages
from typer.testing import CliRunner

import codellama_rt
from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.cli import bench as cli_bench
from codellama_rt.cli import main as cli
from codellama_rt.llm.variants import SHAPES
from codellama_rt.model import llama
from codellama_rt.ops.native import _core
from codellama_rt.ops.schema import OPS
from codellama_rt.tools import limits as limits_module
from codellama_rt.tools.bench import op_check, tables
from codellama_rt.tools.bench.compare import compare_records
from codellama_rt.tools.bench.generate_rows import Model, generate_rows
from codellama_rt.tools.bench.measure import Timing, doubt, drift, save, steadiest, stopwatch
from codellama_rt.tools.bench.op_arrays import Turns, make_arrays
from codellama_rt.tools.bench.op_cases import DTYPES, Selection
from codellama_rt.tools.bench.op_rows import op_row, op_rows
from codellama_rt.tools.bench.records import read_record
from codellama_rt.tools.bench.runner import Runner
from codellama_rt.tools.bench.synthetic import write_directory, write_gguf
from codellama_rt.tools.limits import (
    Limits,
    cpu_name,
    huge_share,
    instruction_rate,
    instructions,
    measure_limits,
    peak,
    probe_memory,
    set_rates,
)

ROW = {
    "what": "decode", "model": "tiny", "weights": "int4", "kv": "int8", "depth": 5,
    "isa": "avx2", "threads": 2, "median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0,
    "tokens_per_s": 1e6, "gb_per_s": 1.0, "share": 0.5, "roof_drift": 0.0,
}  # fmt: skip

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def limits():
    return measure_limits(0.001)


@pytest.fixture
def bench():
    """`codellama-rt bench ...`: (exit code, stdout, stderr)."""

    def run(*words):
        result = CliRunner().invoke(cli.app, ["bench", *map(str, words)])
        return result.exit_code, result.stdout, result.stderr

    return run


def cases(**options):
    return list(
        Selection(**{"models": ("tiny",), "tokens": (1, 5), "keys": (70,)} | options).cases()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", ["7b", "13b", "34b", "70b"])
def test_the_cases_cover_every_op_of_the_schema(model, dtype):
    found = cases(models=(model,), dtypes=(dtype,), tokens=(1, 512), keys=(2048, 100_000))
    assert {case.op.name for case in found} == set(OPS)
    for case in found:
        assert case.num_bytes > 0
        assert case.flops >= 0
        moves = ("embedding", "reshape_and_cache", "copy_blocks")
        assert (case.flops > 0) == (case.op.name not in moves)


def test_bytes_of_a_decode_step_are_those_of_the_weight_and_the_cache():
    linear = next(c for c in cases(models=("7b",)) if c.label.startswith("o 1x"))
    assert linear.num_bytes == 4096 * 4096 * 2 + 2 * 4096 * 4
    attention = next(c for c in cases(models=("34b",), keys=(100_000,), ops=("paged_attention",)))
    assert attention.num_bytes == 2 * 100_000 * 8 * 128 * 2 + 2 * 64 * 128 * 4


def test_a_selection_refuses_what_does_not_exist():
    for options, message in [
        ({"ops": ("lineer",)}, "ops: expected some of embedding"),
        ({"models": ("8b",)}, "models: expected some of 7b"),
        ({"dtypes": ("int3",)}, "dtypes: expected some of float32"),
        ({"tokens": (0,)}, "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            Selection(**options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tiny_case_is_right(dtype):
    found = cases(dtypes=(dtype,))
    assert found
    for case in found:
        op_check.check(case, make_arrays(case, np.random.default_rng(0)))


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_is_found(op, monkeypatch):
    case = next(case for case in cases() if case.op.name == op)
    arrays = make_arrays(case, np.random.default_rng(0))
    monkeypatch.setattr(op_check, "bind", lambda op, arrays: lambda: None)  # computes nothing
    with pytest.raises(RuntimeError, match=f"{op} tiny .* differs from the reference"):
        op_check.check(case, arrays)


def test_buffers_take_turns_and_exceed_the_cache():
    case = next(case for case in cases() if case.op.name == "rms_norm")
    turns = Turns(case, make_arrays(case, np.random.default_rng(0)), num_bytes=10_000)
    calls = [turns._call]
    for _ in range(20):
        turns.advance()
        calls.append(turns._call)
    pointers = [call.args[0].ctypes.data for call in calls]
    copies = len(set(pointers))
    assert copies * case.num_bytes >= 9_000
    assert pointers[copies] == pointers[0]


def test_a_row_says_what_and_how_fast():
    case = next(case for case in cases() if case.op.name == "linear")
    row = op_row(case, 0.0)
    assert row["runs"] >= 20
    assert (row["op"], row["dtype"], row["model"]) == ("linear", "bfloat16", "tiny")
    assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
    assert row["share"] == pytest.approx(row["limit_us"] / row["median_us"])


def test_a_selection_without_rows_is_refused():
    with pytest.raises(ValueError, match="no operator supports this dtype"):
        list(op_rows(Selection(ops=("rms_norm",), dtypes=("q4_0",)), [ops.isa()], 0.0))


def test_the_limits_are_measured_for_every_kind_of_product(limits):
    assert set(limits.flops) == {"float32", "float16", "bfloat16", "int8"}
    assert min(limits.flops.values()) > 0
    assert limits.one_thread_bandwidth > 0
    assert "GB/s" in limits.describe()
    with pytest.raises(ValueError, match="must be one of float32, float16, bfloat16, int8, got"):
        peak("int4")
    with pytest.raises(ValueError, match=r"must be one of fp32 FMA.*, got 'vmul'"):
        instruction_rate("vmul")


def test_a_limit_is_that_of_the_fastest_instruction_that_can_do_the_work():
    rates = {"fp32 FMA": 3.0, "vdpbf16ps": 2.0, "vpmaddwd": 4.0, "vpdpbusd": 9.0}
    limits = Limits("avx512_vnni", 2, 1e9, 5e8, rates)
    assert limits.flops == {"float32": 3.0, "float16": 3.0, "bfloat16": 3.0, "int8": 9.0}
    assert (limits.fastest("bfloat16"), limits.fastest("int8")) == ("fp32 FMA", "vpdpbusd")
    assert "in huge pages" not in limits.describe()
    assert "10% of it in huge pages" in replace(limits, huge_pages=0.1).describe()


def test_instructions_are_those_of_every_set_that_the_cpu_runs():
    found, before = instructions(), ops.isa()
    ops.set_isa("baseline")  # what is measured does not depend on the set in use
    try:
        assert instructions() == found
        name, rate = peak("int8", 0.0)
    finally:
        ops.set_isa(before)
    assert "fp32 FMA" in found
    assert set(found.values()) <= set(ops.available_isas())
    assert name in found
    assert rate > 0
    with pytest.raises(ValueError, match="no instruction 'vmul'"):
        _core.multiply_add("baseline", "vmul", 1)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_a_probe_counts_its_operations(isa):
    for name in _core.INSTRUCTIONS:
        once = _core.multiply_add(isa, name, 1)
        assert once % ops.num_threads() == 0
        assert _core.multiply_add(isa, name, 3) == 3 * once


def test_rates_of_a_set_are_those_of_what_its_kernels_use(monkeypatch):
    has = {"avx512_bf16": ["fp32 FMA", "vdpbf16ps", "vpmaddwd", "vpdpbusd"], "avx2": ["fp32 FMA"]}
    speed = {"fp32 FMA": 4.0, "vdpbf16ps": 2.0, "vpmaddwd": 9.0, "vpdpbusd": 8.0}
    core = SimpleNamespace(
        INSTRUCTIONS=list(speed), multiply_add=lambda isa, name, rounds: name in has[isa]
    )
    monkeypatch.setattr(limits_module, "_core", core)
    monkeypatch.setattr(limits_module, "_rate", lambda isa, name, seconds: speed[name])
    assert set_rates("avx512_bf16") == {
        "float32": 4.0, "float16": 4.0, "bfloat16": 2.0, "int8": 8.0
    }  # fmt: skip
    assert set(set_rates("avx2").values()) == {4.0}
    monkeypatch.undo()
    before = ops.isa()
    assert min(set_rates("baseline", 0.0).values()) > 0
    assert ops.isa() == before


def test_huge_pages_are_asked_for_the_memory_that_is_read():
    """Whether there are any is up to the system."""
    memory, other = probe_memory(2**25), probe_memory(2**25, huge_pages=False)
    assert advised_huge_pages(memory.ctypes.data)
    assert not advised_huge_pages(other.ctypes.data)
    assert 0.0 <= huge_share(memory) <= 1.0
    assert huge_share(other) == 0.0


def test_the_share_of_memory_in_huge_pages_is_what_linux_says(monkeypatch):
    memory = np.zeros(2**23, np.uint8)
    first, last = memory.ctypes.data - 4096, memory.ctypes.data + memory.nbytes

    def share(kilobytes):
        maps = "".join(
            f"{begin:x}-{end:x} rw-p 00000000 00:00 0 \nAnonHugePages: {count:8} kB\n"
            for begin, end, count in [
                (4096, first, 1),
                (first, last, kilobytes),
                (last, last + 4096, 2),
            ]
        )
        smaps = SimpleNamespace(read_text=lambda: maps)
        monkeypatch.setattr(limits_module, "Path", lambda name: smaps)
        return huge_share(memory)

    assert [share(count) for count in (0, 2048, 6144, 8192, 10240)] == [0.0, 0.25, 0.75, 1.0, 1.0]


def test_products_of_quantised_weights_and_caches_are_integers():
    for op in ("linear", "paged_attention", "decoder_layer"):
        found = {c.product_dtype for c in cases(dtypes=("int8", "int4"), ops=(op,))}
        assert found == {"int8"}


def test_timing_keeps_the_middle_of_the_runs():
    record = Timing([1e-6 * x for x in range(1, 12)]).record()
    assert record == {
        "median_us": pytest.approx(6), "p10_us": pytest.approx(2), "p90_us": pytest.approx(10),
        "best_us": pytest.approx(1), "runs": 11,
    }  # fmt: skip
    ran = []
    assert len(stopwatch(lambda: ran.append("work"), lambda: ran.append("setup"), 3)) == 3
    assert ran == ["setup", "work"] * 3


def test_a_file_says_what_was_typed(tmp_path, monkeypatch):
    words = ["--peer-python", "/x/python", "--json", "a.json", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *words])
    save(tmp_path / "a.json", "peers", [{"what": "decode"}], "python bench_peers.py")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["command"] == "python bench_peers.py --peer-python PYTHON --steps 3"
    assert (record["cpu"], record["isa"]) == (cpu_name(), ops.isa())
    assert (record["threads"], record["version"]) == (ops.num_threads(), codellama_rt.__version__)
    assert record["rows"] == [{"what": "decode"}]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_synthetic_checkpoints_open(tmp_path, weights):
    write_directory(tmp_path / "model", SHAPES["tiny"], dtype=weights)
    checkpoint = open_checkpoint(tmp_path / "model")
    projection = checkpoint.weights.layers[1].q_proj
    assert getattr(projection.dtype, "name", projection.dtype) == weights
    assert Runner(checkpoint, 16).weights_dtype == weights


def test_both_forms_hold_the_same_model(tmp_path):
    write_directory(tmp_path / "model", SHAPES["tiny"])
    write_gguf(tmp_path / "model.gguf", SHAPES["tiny"])
    logits = [
        Runner(open_checkpoint(path), 16, "float32").logits([3, 4, 5])
        for path in (tmp_path / "model", tmp_path / "model.gguf")
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5 * np.abs(logits[0]).max())


def test_operations_of_a_prompt_are_those_of_its_products(tmp_path, monkeypatch):
    """Of the last layer one token, but for keys and values; its other queries are not needed."""
    write_directory(tmp_path / "model", SHAPES["tiny"])
    num_tokens, products = 100, []
    linear, decoder_layer = llama.ops.linear, llama.ops.decoder_layer

    def count(x, weights, **options):
        matrices = weights if isinstance(weights, list | tuple) else [weights]
        products.extend(2 * x.size * matrix.shape[0] for matrix in matrices)
        return linear(x, weights, **options)

    def count_layer(x, *arguments, **options):
        matrices = (*arguments[1:5], *arguments[6:9])  # without the norms
        products.extend(2 * len(x) * matrix.size for matrix in matrices)
        return decoder_layer(x, *arguments, **options)

    runner = Runner(open_checkpoint(tmp_path / "model"), 200)
    monkeypatch.setattr(llama.ops, "linear", count)
    monkeypatch.setattr(llama.ops, "decoder_layer", count_layer)
    runner.prefill(num_tokens)
    c = runner.config
    width = c.n_heads * c.head_dim
    scores = 2 * num_tokens * width * ((c.n_layers - 1) * num_tokens + 2)
    not_needed = 2 * (num_tokens - 1) * c.dim * width
    assert runner.prefill_flops(num_tokens) == sum(products) + scores - not_needed


def test_a_runner_takes_real_steps_after_a_context_that_was_never_computed(tmp_path):
    write_directory(tmp_path / "model", SHAPES["tiny"])
    runner = Runner(open_checkpoint(tmp_path / "model"), 300)
    forwards = []
    forward = runner.model.model.forward
    runner.model.model.forward = lambda batch, cache: (
        forwards.append(int(batch.seq_lens[0])) or forward(batch, cache)
    )
    assert len(runner.decode(300, 3)) == 3
    assert forwards == [301, 302, 303]
    forwards.clear()
    runner.prefill(40)
    assert forwards == [40]
    with pytest.raises(ValueError, match="steps must be under"):
        runner.decode(1, 1000)


@pytest.mark.parametrize("kv", ["bfloat16", "float32", "int8", "int4"])
def test_generate_rows(limits, kv):
    model = Model(shape="tiny", weights="bfloat16", kv_dtype=kv)
    rows = list(
        generate_rows([model], [100], [20], steps=3, repeats=2, limits=limits, python_share=True)
    )
    assert [(done, total) for done, total, _ in rows] == [(1, 2), (2, 2)]
    decode, prefill = (row for *_, row in rows)
    assert (decode["depth"], decode["kv"], prefill["tokens"]) == (100, kv, 20)
    assert decode["bytes"] > 0
    assert "python_share" in decode


def test_ops_command(bench, tmp_path):
    file = tmp_path / "ops.json"
    code, out, err = bench("ops", "--quick", "--op", "linear,copy_blocks", "--json", file)
    assert code == 0
    assert "GFLOP/s:" in err
    assert "copy_blocks" in out
    record = json.loads(file.read_text())
    assert {row["op"] for row in record["rows"]} == {"linear", "copy_blocks"}


def test_generate_command(bench, tmp_path, monkeypatch):
    # Rows whose limit moved are left out of tables; here others may have the CPU.
    monkeypatch.setattr("codellama_rt.tools.bench.tables.doubt", lambda row: None)
    file = tmp_path / "generate.json"
    code, out, _ = bench("generate", "--quick", "--weights", "int4", "--json", file)
    assert code == 0
    assert "Decoding" in out
    assert "Prompts" in out
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["decode", "prefill"]
    assert {row["weights"] for row in rows} == {"int4"}


def test_wrong_lists_are_told(bench):
    code, _, err = bench("ops", "--tokens", "1,x")
    assert code == 2
    assert "expected whole numbers separated by commas, got '1,x'" in err


def saved(path, rows, **about):
    about = {"cpu": "Zen 4", "isa": "avx512_bf16", "threads": 2} | about
    path.write_text(json.dumps({"command": "bench", **about, "rows": rows}))
    return path


def test_compare_gives_a_ratio_per_row_and_marks_roofs_that_moved(bench, tmp_path):
    decode = ROW | {"best_us": 0.5, "read_gb_per_s": 60.0}
    op = {"what": "op", "op": "linear", "shape": "o 512x4096x4096", "model": "7b", "share": 0.5,
          "dtype": "int8", "tokens": 512, "median_us": 30.0, "best_us": 20.0, "bound": "compute",
          "read_gb_per_s": 60.0, "peak_gflop_per_s": 900.0,
          "isa": "avx2", "threads": 2}  # fmt: skip
    before = saved(tmp_path / "a.json", [decode, decode | {"depth": 6}, op])
    after = saved(tmp_path / "b.json", [
        op | {"median_us": 10.0, "best_us": 10.0, "read_gb_per_s": 20.0},
        decode | {"median_us": 0.5, "read_gb_per_s": 40.0},
        decode | {"depth": 7},
    ], cpu="Emerald Rapids")  # fmt: skip
    code, out, err = bench("compare", before, after)
    assert code == 0
    assert "Not the same: cpu: Zen 4 before, Emerald Rapids after" in err
    assert "isa" not in err
    assert "a.json -> b.json, Emerald Rapids" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "linear o 512x4096x4096 7b int8 30 10 3.00 2.00 1.00" in lines
    assert "decode tiny int4 int8 depth 5 1 0.5 2.00? 1.00 0.67" in lines
    assert "? decode tiny int4 int8 depth 5: the limit was 0.67 times that of before" in out
    assert "depth 6" not in out
    assert "depth 7" not in out


def test_compare_names_sets_and_threads_only_where_a_file_has_several(tmp_path):
    slow, fast = ROW | {"isa": "avx2", "median_us": 4.0}, ROW | {"isa": "avx512", "median_us": 2.0}
    one, other = (read_record(saved(tmp_path / "x.json", [row])) for row in (slow, fast))
    (row,) = compare_records(one, other)
    assert (row["name"], row["ratio"], row["doubt"]) == ("decode tiny int4 int8 depth 5", 2.0, None)
    both = read_record(saved(tmp_path / "x.json", [slow, fast]))
    (row,) = compare_records(both, other)
    assert (row["name"], row["ratio"]) == ("decode tiny int4 int8 depth 5 avx512", 1.0)
    doubtful = read_record(saved(tmp_path / "x.json", [fast | {"share": 2.0}]))
    (row,) = compare_records(doubtful, other)
    assert row["doubt"] == "before: 200% of the limit"


def test_compare_refuses_files_that_have_nothing_in_common(bench, tmp_path):
    before = saved(tmp_path / "a.json", [ROW])
    code, _, err = bench("compare", before, saved(tmp_path / "b.json", [ROW | {"depth": 9}]))
    assert code == 2
    assert "have no row in common" in err
    (tmp_path / "c.json").write_text("{")
    code, _, err = bench("compare", before, tmp_path / "c.json")
    assert code == 2
    assert "c.json is not JSON" in err
    (tmp_path / "c.json").write_text("{}")
    code, _, err = bench("compare", before, tmp_path / "c.json")
    assert code == 2
    assert "neither pytest-benchmark nor `codellama-rt bench` wrote it" in err


RECORDED = Path(__file__).parents[1] / "data" / "bench_rows.json"


def test_report_makes_its_files(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(RECORDED), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"measurements.md", "roofline.svg", "context.svg"}
    text = (tmp_path / "measurements.md").read_text()
    for title in ("Operators: tiny", "Decoding: tiny", "Prompts: tiny", "Whole prompts", "Pairs"):
        assert f"## {title}" in text
    assert "Measured on AMD EPYC (family 25, model 17) by" in text
    assert "llama.cpp q8_0, float16 cache prefill 7b int8 bfloat16 512: the limit moved" in text
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert "read" in (tmp_path / "roofline.svg").read_text()


def test_the_picture_over_the_context_is_of_whole_models():
    plots = pytest.importorskip("plots")
    slices = ROW | {"layers": 4, "is_whole": False}
    whole = slices | {"is_whole": True, "bytes": 6e3, "read_gb_per_s": 2.0}
    by_layers = slices | {"whole_us": 8.0, "peer_whole_us": 16.0, "whole_bytes": 4e3, "peer": "x",
                          "read_gb_per_s": 1.0}  # fmt: skip
    ours, pair = plots.whole_steps([slices, whole, ROW | {"what": "prefill"}, by_layers])
    assert (ours["us"], ours["limit_us"], "peer_us" in ours) == (1.0, 3.0, False)
    assert (pair["us"], pair["limit_us"], pair["peer_us"]) == (8.0, 4.0, 16.0)


def test_report_refuses_other_files(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(tmp_path / "x.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1


def test_pytest_benchmark_carries_the_rows(tmp_path):
    file = tmp_path / "ops.json"
    command = [sys.executable, "-m", "pytest", "-q", str(BENCHMARKS / "bench_ops.py"),
               "--shape", "tiny", "--op", "rms_norm,copy_blocks", "--tokens", "1", "--keys", "64",
               "--seconds", "0.001", f"--benchmark-json={file}"]  # fmt: skip
    # The child is a session of its own: what xdist tells its workers is not for it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    assert read_record(file).cpu == cpu_name()
    infos = [one["extra_info"] for one in json.loads(file.read_text())["benchmarks"]]
    assert [info["op"] for info in infos] == ["rms_norm", "copy_blocks"]
    for info in infos:
        assert {"bytes", "flops", "limit_us", "share", "dtype", "shape", "isa", "threads"} <= set(
            info
        )


@pytest.mark.parametrize(
    ("found", "shown", "reason"),
    [
        ({}, "50%", None),
        ({"share": 1.03}, ">100%", None),
        ({"share": 1.06}, None, "106% of the limit"),
        ({"roof_drift": 0.15}, "50%", None),
        ({"roof_drift": 0.16}, None, "the limit moved by 16%"),
        ({"peer_median_us": -1.0}, None, "noise was more than the difference of two models"),
    ],
)
def test_a_row_in_doubt_is_left_out(found, shown, reason, capsys, tmp_path):
    row, file = ROW | found, tmp_path / "rows.json"
    assert doubt(row) == reason
    cli_bench._follow("generate", iter([(1, 1, row)]), file)
    out, err = capsys.readouterr()
    assert ("Left out: decode tiny int4 int8 5" in out) == (reason is not None)
    assert ("Rows were left out" in err) == (reason is not None)
    assert (shown or reason) in out
    assert ("Decoding" in out) == (shown is not None)
    assert json.loads(file.read_text())["rows"] == [row]


def test_a_row_in_doubt_is_measured_again():
    measured = iter([{"share": 2.0}, {"roof_drift": 0.4}, {"share": 0.5}, {"share": 0.6}])
    assert steadiest(lambda: next(measured)) == {"share": 0.5}
    assert steadiest(lambda: next(measured)) == {"share": 0.6}
    bad = iter([{"share": 2.0, "run": i} for i in range(3)])
    assert steadiest(lambda: next(bad))["run"] == 2
    assert drift(80.0, 100.0) == drift(100.0, 80.0) == pytest.approx(0.2)


def test_tables_hold_every_row_and_are_narrow(capsys):
    rows = json.loads(RECORDED.read_text())["rows"]
    doubtful = len(tables.left_out(rows))
    assert sum(len(cells) for _, _, cells in tables.tables(rows)) == len(rows) - doubtful
    assert all(tables.brief(row) for row in rows)
    tables.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)


def test_the_longest_names_fit_into_a_table(capsys):
    row = {"what": "op", "op": "apply_rotary_pos_emb", "shape": "gate_up 512x8192x57344",
           "model": "70b", "dtype": "bfloat16", "isa": "avx512_vnni", "threads": 2,
           "median_us": 12345.678, "p10_us": 1e4, "p90_us": 2e4, "bound": "compute",
           "gflop_per_s": 1234.5, "instruction": "vdpbf16ps", "peak_gflop_per_s": 12345.6,
           "share": 1.04}  # fmt: skip
    tables.show([row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    assert any("apply_rotary_pos_emb" in line and "vdpbf16ps 12346" in line for line in lines)


def test_the_suite_is_no_part_of_the_tests():
    """Timing belongs to a quiet machine; a plain pytest collects no benchmark."""
    text = (BENCHMARKS.parent / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in text
