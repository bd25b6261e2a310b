"""Sequences over one prefix, together and apart: the tables, the sides, the script."""

import json
import sys
from typing import ClassVar

import bench_shared_prefix as bench
import numpy as np
import pytest
from peers.pairs import Round

from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench import tables
from codellama_rt.tools.bench.synthetic import write_directory


class Fake:
    """A peer whose steps take an hour, with flash attention two."""

    orders: ClassVar[list] = []

    def __init__(self, python, script):
        assert (python, script) == ("python", "peer_llamacpp")
        self.hours = 1

    def ask(self, do, **given):
        Fake.orders.append((do, given))
        if do == "use":
            self.hours += given["flash"]
        return {"seconds": 3600.0 * self.hours}

    def close(self):
        Fake.orders.append(("close", {}))


def test_tables_told_apart_have_the_same_blocks_and_no_common_head():
    shared = np.int32([[4, 7, 1, 9], [4, 7, 1, 8], [4, 7, 1, 5]])
    found = bench.told_apart(shared)
    assert found[:, 0].tolist() == [4, 7, 1]
    assert (found[:, 1:] == shared[:, 1:]).all()
    assert (shared[:, 0] == 4).all()


def test_the_sides_of_attention():
    sides = bench.attention_sides(SHAPES["tiny"], "float32", 256, 3)
    assert list(sides) == ["one", "together", "apart"]
    assert all(side() > 0 for side in sides.values())


def test_steps_are_of_samples_that_share_their_blocks_or_not(tmp_path):
    write_directory(tmp_path / "model", SHAPES["tiny"], dtype="float32")
    steps = bench.Steps(tmp_path / "model", "float32", 300, 3, 2)
    seen, forward = [], steps.runner.model.model.forward
    steps.runner.model.model.forward = lambda batch, cache: (
        seen.append(batch.block_tables.copy()) or forward(batch, cache)
    )
    for is_apart in (False, True, False):
        seen.clear()
        assert steps.seconds(is_apart) > 0
        assert len(seen) == 2
        for table in seen:
            assert len(table) == 3
            assert len(set(table[:, 0])) == (3 if is_apart else 1)
            assert (table[:, 1:4] == table[0, 1:4]).all()


def test_a_ratio_is_the_median_of_the_rounds_that_were_steady():
    def taken(one, together, apart, drift):
        return Round({"one": one, "together": together, "apart": apart}, drift, 1e9)

    row = bench.shared_row([taken(1.0, 1.5, 6.0, 0.0), taken(2.0, 3.2, 16.0, 0.1),
                            taken(1.0, 9.0, 9.0, 0.9)], 8)  # fmt: skip
    assert row["times_one"] == pytest.approx(1.55)
    assert row["gain"] == pytest.approx(4.5)
    assert (row["steady"], row["rounds"]) == (2, 3)
    assert row["tokens_per_s"] == pytest.approx(8 / 2.35)


def test_the_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "Peer", Fake)
    monkeypatch.setattr(Fake, "orders", [])
    monkeypatch.setattr(bench, "write_gguf", lambda path, config: path.touch())
    file = tmp_path / "rows.json"
    words = ["--quick", "--peer-python", "python", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_shared_prefix.py", *words])
    bench.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["part"], row["depth"]) for row in rows] == [("attention", 1100), ("step", 1100)]
    assert "peer_median_us" not in rows[0]
    assert rows[1]["ratio"] > 1
    assert (rows[1]["setting"], rows[1]["peer_median_us"]) == ("llama.cpp, no flash", 3.6e9)
    given = {"num_seqs": 3, "depth": 1100, "steps": 2, "shared": True}
    assert Fake.orders[4:] == [("batch", given)] * 4 + [("close", {})] * 2
    for row in rows:
        row["roof_drift"] = 0.0
    capsys.readouterr()
    tables.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert any("Sequences over one prefix: tiny" in line for line in lines)
    assert max(map(len, lines)) <= tables.WIDTH


def test_attention_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_shared_prefix.py", "--quick", "--kv-dtype", "int8"])
    monkeypatch.setitem(bench.QUICK, "layers", 0)
    monkeypatch.setitem(bench.QUICK, "kv_dtype", ["int8"])
    bench.main()
    out = capsys.readouterr().out
    assert "attention, 3" in out or "Left out" in out
