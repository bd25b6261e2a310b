"""The CUDA benchmarks at tiny sizes on the emulated device; what they measure is not asserted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_cuda
import cuda_peers
import pytest

FOLDER = Path(bench_cuda.__file__).parent


@pytest.fixture(autouse=True)
def no_peers(monkeypatch):
    """Peers need a GPU, whatever is installed here."""
    monkeypatch.setattr(cuda_peers, "imported", lambda name: None)


def rows_of(section, folder):
    bench_cuda.main(["--section", section, "--smoke", "--out", str(folder)])
    return [json.loads(line) for line in (folder / f"{section}.jsonl").read_text().splitlines()]


EXPECTED = {
    "small": {"read roof", "copy roof", "rope_and_cache 32/32, 1 tokens",
              "rope_and_cache 32/32, 130", "linear 1 x 128 x 64, bf16",
              "linear 40 x 128 x 64, int8", "linear 40 x 128 x 64, int4"},
    "decode": {"decode 2/2, batch 1, 100 tokens, bfloat16", "decode 8/1, batch 2, 100 tokens, fp8",
               "decode 8/1, batch 1, 100 tokens, int8"},
    "prefill": {"prefill 2/2, 40 tokens, causal, bfloat16"},
    "model-bf16": {"7B bf16/bfloat16, step at 70", "7B bf16/bfloat16, prefill of 50"},
    "model-int8-fp8": {"7B int8/fp8, step at 70", "7B int8/fp8, prefill of 50"},
}  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("section", bench_cuda.SECTIONS)
def test_a_section_gives_its_rows(section, tmp_path):
    rows = rows_of(section, tmp_path)
    found = [row["what"] for row in rows]
    missing = [what for what in EXPECTED[section] if not any(f.startswith(what) for f in found)]
    assert not missing
    assert all(row["us"] > 0 and row["rate"] > 0 for row in rows)
    assert all(row["p10"] <= row["us"] <= row["p90"] for row in rows)
    bench_cuda.table(rows)


@pytest.mark.usefixtures("emulated")
def test_what_there_is_no_time_for_is_said(tmp_path, capsys):
    bench_cuda.main(["--section", "decode", "--smoke", "--seconds", "0", "--out", str(tmp_path)])
    assert "no time for decode 2/2, batch 1, 100 tokens, bfloat16" in capsys.readouterr().out


CHILD = """
import json, pathlib, sys, time
name, folder = sys.argv[sys.argv.index("--section") + 1], pathlib.Path(sys.argv[1])
if name == "decode":
    time.sleep(600)
times = dict(us=2.0, p10=1.0, p90=3.0)
row = dict(what=name, who="ours", **times, rate=1.0, unit="TB/s", share=None, of="")
(folder / (name + ".jsonl")).write_text(json.dumps(row) + "\\n")
if name == "prefill":
    sys.exit(3)
"""


def test_a_section_that_hangs_or_fails_leaves_the_others(tmp_path, monkeypatch):
    parts = dict.fromkeys(bench_cuda.SECTIONS, 1000) | {"decode": 1}
    monkeypatch.setattr(bench_cuda, "SECTIONS", parts)
    faults = bench_cuda.run_all([sys.executable, "-c", CHILD, str(tmp_path)], tmp_path, 4000)
    assert [fault.split(" after")[0] for fault in faults] == [
        "decode: stopped", "prefill: exit status 3",
    ]  # fmt: skip
    record = json.loads((tmp_path / bench_cuda.FILE).read_text())
    assert [row["what"] for row in record["rows"]] == [name for name in parts if name != "decode"]
    assert record["faults"] == faults


def test_ours_is_compared_with_the_best_peer():
    common = {"what": "x", "p10": 1, "p90": 9, "rate": 1.0, "unit": "TB/s", "of": "read roof"}
    rows = [
        {**common, "who": "ours", "us": 4.0, "share": 0.5},
        {**common, "who": "one", "us": 9.0, "share": None},
        {**common, "who": "other", "us": 6.0, "share": None},
    ]
    lines = bench_cuda.table(rows).splitlines()
    assert lines[2] == "| x | ours | 4.0 (1.0-9.0) | 1 TB/s | 50% of read roof | 1.50 |"
    assert lines[3].endswith("|  |  |")


def test_without_a_device_it_says_why(tmp_path):
    result = subprocess.run(
        [sys.executable, str(FOLDER / "bench_cuda.py"), "--section", "small", "--smoke", "--out",
         str(tmp_path)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode == 0:
        pytest.skip("a GPU is here")
    assert result.stderr.startswith("bench_cuda: ")


def test_the_script_is_a_script_and_sanitizes_every_kind_of_kernel():
    script = FOLDER / "run.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    (expression,) = re.findall('^few="(.*)"$', script.read_text(), re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-k",
         expression, "tests/devices/cuda"], capture_output=True, text=True, check=True,
        cwd=FOLDER.parents[1],
    )  # fmt: skip
    for name in ("page_sizes", "three_weights", "rope_and_cache", "copy_blocks", "merge"):
        assert re.search(rf"test_\w*{name}\w*\[.*gpu", result.stdout), name
