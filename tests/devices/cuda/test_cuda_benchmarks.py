"""The first run on a GPU, dry: every step of run.sh on the emulated device, at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_cuda
import cuda_peers
import pytest

FOLDER = Path(bench_cuda.__file__).parent
# What each step must measure; the figures of an emulator say nothing.
EXPECTED = {
    "roofs": {"read roof", "copy roof"},
    "decode-bfloat16": {"decode 2/2, batch 1, 100 tokens, bfloat16"},
    "decode-fp8": {"decode 8/1, batch 1, 100 tokens, fp8"},
    "decode-int8": {"decode 8/1, batch 1, 100 tokens, int8"},
    "decode-fp8-8-warps": {"decode 2/2, batch 1, 100 tokens, fp8"},
    "decode-int8-8-warps": {"decode 2/2, batch 1, 100 tokens, int8"},
    "decode-batches": {"decode 8/1, batch 2, 100 tokens, bfloat16"},
    "prefill": {"prefill 2/2, 40 tokens, causal, bfloat16"},
    "linear": {"linear 1 x 128 x 64, bf16", "linear 40 x 128 x 64, int8",
               "linear 40 x 128 x 64, int4"},
    "rope": {"rope_and_cache 32/32, 1 tokens, bf16", "rope_and_cache 32/32, 130 tokens, bf16"},
    "model-bf16": {"7B bf16/bfloat16, step at 70", "7B bf16/bfloat16, prefill of 50"},
    "model-int8-fp8": {"7B int8/fp8, step at 70", "7B int8/fp8, prefill of 50"},
    "bits": {"elements of a chunk equal to those of steps", "3 repeated steps equal to the first"},
    "peers": {"decode 2/2, batch 1, 100 tokens, bfloat16"},
}  # fmt: skip


def run_script(module, out, part="all", **variables):
    """run.sh, dry: (exit status, rows, what it printed)."""
    environment = {
        **os.environ, "EMULATED": module.__file__, "OUT": str(out), "PYTHON": sys.executable,
        **variables,
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), part], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return result.returncode, bench_cuda.read_rows(out / "rows.jsonl"), result.stdout


def test_every_step_of_the_first_run(emulated_module, tmp_path):
    status, rows, text = run_script(emulated_module, tmp_path)
    outcomes = {row["step"]: row["outcome"] for row in rows if "step" in row}
    assert set(outcomes.values()) == {"passed"}, (outcomes, (tmp_path / "run.log").read_text())
    assert status == 0
    assert bench_cuda.STEPS.keys() <= outcomes.keys()
    measured = {row["what"] for row in rows if "what" in row}
    assert set().union(*EXPECTED.values()) <= measured
    assert len(list(tmp_path.iterdir())) <= 8
    assert (tmp_path / "table.md").read_text() in text


def test_a_failing_kernel_costs_its_own_rows(emulated_module, tmp_path):
    status, rows, text = run_script(
        emulated_module, tmp_path, "first", ONLY="^(roofs|check (silu|rope).*|rope|prefill)$",
        CODELLAMA_RT_EMULATED_FAULT="RopeAndCacheParams",
    )  # fmt: skip
    outcomes = {row["step"]: row["outcome"].split()[0] for row in rows if "step" in row}
    assert outcomes == {
        "roofs": "passed", "check silu_and_mul": "passed", "check rope_and_cache": "failed",
        "prefill": "passed", "rope": "failed",
    }  # fmt: skip
    assert status == 1
    assert "FAILED: check rope_and_cache rope" in text
    measured = {row["what"] for row in rows if "what" in row}
    assert EXPECTED["prefill"] | EXPECTED["roofs"] == measured
    assert "rope: failed" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("emulated")
def test_what_there_is_no_time_for_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda_peers, "imported", lambda name: None)
    rows = tmp_path / "rows"
    bench_cuda.main(["decode-int8", "--smoke", "--seconds", "0", "--rows", str(rows)])
    assert "no time for decode 2/2, batch 1, 100 tokens, int8" in capsys.readouterr().out
    assert rows.read_text() == ""


def test_ours_is_compared_with_the_best_peer_and_failures_come_first():
    common = {"what": "x", "p10": 1, "p90": 9, "rate": 1.0, "unit": "TB/s", "of": "read roof"}
    rows = [
        {**common, "who": "ours", "us": 4.0, "share": 0.5},
        {**common, "who": "one", "us": 9.0, "share": None},
        {"step": "a", "outcome": "passed", "seconds": 3},
        {**common, "who": "other", "us": 6.0, "share": None},
        {"step": "b", "outcome": "failed (124)", "seconds": 40},
    ]
    lines = bench_cuda.table(json.loads(json.dumps(rows))).splitlines()
    assert lines[0] == "b: failed (124) after 40 s"
    assert lines[4] == "| x | ours | 4.0 (1.0-9.0) | 1 TB/s | 50% of read roof | 1.50 |"
    assert lines[5].endswith("|  |  |")


def test_without_a_device_it_says_why(tmp_path):
    result = subprocess.run(
        [sys.executable, str(FOLDER / "bench_cuda.py"), "rope", "--smoke", "--rows",
         str(tmp_path / "rows")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode == 0:
        pytest.skip("a GPU is here")
    assert result.stderr.startswith("bench_cuda: ")
