"""Products beside torch: which of its dtypes are the peer."""

import json
import sys

import bench_linear
import pytest

from codellama_rt import ops
from codellama_rt.tools.bench import tables

SECONDS = {"float32": 900.0, "float16": 9000.0, "bfloat16": 1800.0}


class Fake:
    """A torch that takes these seconds by dtype."""

    def __init__(self, python, script):
        assert script == "peer_torch"
        self.orders = []

    def ask(self, do, **given):
        self.orders.append(do)
        if do == "open":
            self.dtype = given["dtype"]
            return {"version": "2"}
        return {"seconds": [1e6, *[SECONDS[self.dtype]] * (given["runs"] - 1)]}  # less the first

    def close(self):
        self.orders.append("close")


@pytest.mark.parametrize("words", [["--dtype", "bfloat16,int8", "--threads", "1"]])
def test_the_peer_is_the_fastest_dtype(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_linear, "Peer", Fake)
    file, before = tmp_path / "rows.json", ops.num_threads()
    monkeypatch.setattr(sys, "argv", ["x", "--quick", *words, "--json", str(file)])
    try:
        bench_linear.main()
        record = json.loads(file.read_text())
        assert record["threads"] == 1
    finally:
        ops.set_num_threads(before)
    rows = record["rows"]
    assert len(rows) == 8  # four products of a layer, in two dtypes
    for row in rows:
        assert row["setting"] == "float32"
        assert set(row["settings_us"]) == {"float32", "bfloat16"}  # float16 is hopeless
        assert row["peer_median_us"] == 9e8
        assert row["gflop_per_s"] > row["peer_gflop_per_s"] > 0
        row["roof_drift"] = 0.0
    capsys.readouterr()
    tables.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert any("Products, in turn with torch: tiny" in line for line in lines)
    assert max(map(len, lines)) <= tables.WIDTH
