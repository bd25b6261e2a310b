"""Sequences of a small model beside peers: the turns, on peers that are fakes."""

import json
import sys
from typing import ClassVar

import bench_small
import numpy as np
import pytest
from bench_small import Ours, Work, in_dtype, small_rows

from codellama_rt import ops
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench import tables
from codellama_rt.tools.bench.runner import Runner
from codellama_rt.tools.bench.synthetic import write_gguf

WORK = Work(sequences=[1, 3], depth=20, prefills=[30], rounds=2, steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path, SHAPES["tiny"])
    return path


class Fake:
    """A peer that takes an hour for all but llama.cpp without flash attention."""

    opened: ClassVar[list] = []

    def __init__(self, python, script):
        self.script, self.orders, self.seconds = script, [], 3600.0
        Fake.opened.append(self)

    def ask(self, do, **given):
        self.orders.append((do, given))
        if do == "use" and not given["flash"]:
            self.seconds = 1800.0
        return {"version": self.script} if do == "open" else {"seconds": self.seconds}

    def close(self):
        self.orders.append(("close", {}))


def test_rows_are_of_the_fastest_setting(model, monkeypatch):
    monkeypatch.setattr(bench_small, "Peer", Fake)
    monkeypatch.setattr(Fake, "opened", [])
    before = ops.num_threads()
    peers = {"llama.cpp": model, "openvino": model.with_suffix(".other")}
    found = list(small_rows(model, "as stored", peers, WORK, "python", [1, 2]))
    rows = [row for *_, row in found]
    assert [(done, total) for done, total, _ in found] == [(i, 6) for i in range(1, 7)]
    assert [row.get("sequences", row.get("tokens")) for row in rows] == [1, 3, 30, 1, 3, 30]
    assert [row["threads"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert {row["setting"] for row in rows} == {"llama.cpp, no flash"}
    assert {row["peer_median_us"] for row in rows} == {1.8e9}
    assert all(row["ratio"] > 1 for row in rows)
    assert rows[0]["versions"].keys() == {"llama.cpp, flash", "llama.cpp, no flash", "openvino"}
    assert ops.num_threads() == before
    assert [peer.script for peer in Fake.opened] == 2 * [*(["peer_llamacpp"] * 2), "peer_openvino"]
    for peer in Fake.opened:
        assert peer.orders[-1] == ("close", {})
        assert ("batch", {"num_seqs": 3, "depth": 20, "steps": 2}) in peer.orders
        assert ("prefill", {"num_tokens": 30}) in peer.orders
        [opened] = [given for do, given in peer.orders if do == "open"]
        name = "openvino" if peer.script == "peer_openvino" else "llama.cpp"
        assert opened["model"] == str(peers[name])


def test_sequences_run_together_though_their_prompts_take_many_steps(model):
    work = Work(sequences=[12], depth=300, prefills=[], rounds=1, steps=3)
    ours = Ours(model, work, ops.num_threads())
    assert ours.batch(12, 300, 3) > 0
    assert not ours._llm.engine.has_unfinished()


def test_sequences_that_end_too_early_are_an_error(model):
    ours = Ours(model, WORK, ops.num_threads())
    ours._new = 2
    with pytest.raises(RuntimeError, match="3 sequences of 20 tokens never run together"):
        ours.batch(3, 20, 2)


def test_a_step_is_of_all_sequences(model):
    ours = Ours(model, WORK, ops.num_threads())
    forwards, engine = [], ours._llm.engine
    forward = engine.model.forward
    engine.model.forward = lambda batch, cache: (
        forwards.append([int(n) for n in batch.seq_lens]) or forward(batch, cache)
    )
    assert ours.batch(3, 20, 2) > 0
    assert forwards[-3:] == [[n] * 3 for n in (forwards[-1][0] - 2, forwards[-1][0] - 1,
                                                forwards[-1][0])]  # fmt: skip
    assert not engine.has_unfinished()
    assert ours.prefill(30) > 0
    assert not engine.has_unfinished()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_another_dtype_is_the_same_model(model, tmp_path, dtype):
    in_dtype(model, tmp_path / "other.gguf", dtype)
    stored, other = (open_checkpoint(path) for path in (model, tmp_path / "other.gguf"))
    assert Runner(other, 16).weights_dtype == dtype
    assert other.config.vocab_size == stored.config.vocab_size
    logits = [Runner(one, 16, "float32").logits([3, 4, 5]) for one in (stored, other)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-2 * np.abs(logits[0]).max())


def test_the_script(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_small, "Peer", Fake)
    file = tmp_path / "rows.json"
    words = ["--quick", "--model", str(model), "--threads", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_small.py", *words])
    bench_small.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["batch", "batch", "prefill"]
    for row in rows:
        row["roof_drift"] = 0.0
    tables.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert any("2 at 32" in line and "llama.cpp, no flash" in line for line in lines)
    assert max(map(len, lines)) <= tables.WIDTH
