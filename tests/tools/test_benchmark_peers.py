"""Pairs with peers: turns, settings, faults; the peers themselves are no dependencies."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from peers import pairs, peer_rows
from peers.pairs import Peer, Round, Slices, compare, take_turns
from peers.peer_rows import Setting, settings

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.tools.bench.measure import doubt
from codellama_rt.tools.bench.runner import Runner

PEERS = Path(pairs.__file__).parent

ECHO = '''
import sys
sys.path.insert(0, {peers!r})
from orders import serve


class Echo:
    """Answers at once, and prints where it should not."""

    def open(self, **unused):
        print("a line of the library's own")
        return {{"version": "1"}}

    def decode(self, depth, steps):
        return {{"seconds": [0.5] * steps}}

    def fail(self):
        raise KeyError("nothing")

    def die(self):
        sys.exit("dead")


serve(Echo())
'''


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """A peer that is none."""
    (tmp_path / "peer_llamacpp.py").write_text(ECHO.format(peers=str(PEERS)))
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "pairs.py"))
    peer = Peer(sys.executable, "peer_llamacpp")
    yield peer
    peer.close()


def test_a_peer_answers_and_its_faults_are_told(echo):
    assert echo.ask("open", model="x") == {"version": "1"}
    assert echo.ask("decode", depth=3, steps=2) == {"seconds": [0.5, 0.5]}
    with pytest.raises(RuntimeError, match="peer_llamacpp: KeyError: 'nothing'"):
        echo.ask("fail")
    with pytest.raises(RuntimeError, match="ended with 1: dead; --peer-python"):
        echo.ask("die")


def test_sides_take_turns_and_unsteady_rounds_do_not_count():
    order = []

    def side(name, *seconds):
        left = iter([0.0, *seconds])  # the first is the warm-up's
        return lambda: order.append(name) or next(left)

    sides = {"ours": side("ours", 1.0, 1.0), "a": side("a", 4.0, 5.0), "b": side("b", 3.0, 9.0)}
    rounds = take_turns(sides, 2)
    assert order == ["ours", "a", "b", "ours", "a", "b", "a", "b", "ours"]
    rounds = [
        replace(rounds[0], drift=0.0, read_bandwidth=10.0),
        replace(rounds[1], drift=0.5, read_bandwidth=20.0),
    ]
    row = compare(rounds, 32, 3, None)
    assert (row["setting"], row["ratio"]) == ("b", 3.0)
    assert row["settings_us"] == {"a": 4e6, "b": 3e6}
    assert row["share"] == pytest.approx(3 / 1.0 / 10)
    assert (row["steady"], row["rounds"], row["roof_drift"]) == (1, 2, 0.0)
    assert doubt(row) is None
    assert doubt(compare(rounds[1:], 32, 3, None)) == "the limit moved by 50%"


def test_layers_are_counted_whole_and_the_head_apart():
    turns = {"ours": Slices(4, 5.0, 2.0), "flash": Slices(4, 8.0, 2.0), "": Slices(4, 5.5, 4.0)}
    assert turns["ours"].layer == 1.0
    assert turns["ours"].whole(32) == 33.0  # a head of 1
    row = compare([Round(turns, 0.0, 10.0)], 32, 4, 100)
    assert row["setting"] == ""  # 19.5 for all layers; flash: 64
    assert (row["ratio"], row["median_us"], row["peer_median_us"]) == (0.5, 1e6, 0.5e6)
    assert row["whole_ratio"] == pytest.approx(19.5 / 33)
    assert (row["whole_us"], row["peer_whole_us"], row["whole_bytes"]) == (33e6, 19.5e6, 100)
    assert row["share"] == pytest.approx(0.4)


def test_settings_leave_out_what_does_not_exist():
    kvs = ["bfloat16", "int4"]
    assert settings(["llama.cpp"], ["int4"], kvs) == [
        Setting("llama.cpp", "int4", "bfloat16"),
        Setting("llama.cpp", "int4", "int4"),
    ]
    assert Setting("llama.cpp", "int4", "bfloat16").variants == {"flash": True, "no flash": False}
    assert Setting("llama.cpp", "int4", "int4").variants == {"flash": True}
    both = settings(["transformers", "ctranslate2"], ["float32", "int8"], kvs)
    assert [(s.peer, s.weights, s.kv) for s in both] == [
        ("transformers", "float32", "float32"), ("ctranslate2", "int8", "bfloat16"),
    ]  # fmt: skip
    assert [list(s.variants) for s in both] == [[""], [""]]
    assert settings(["llama.cpp"], ["int8"], ["int8"])[0].peer_name == "llama.cpp q8_0, q8_0 cache"
    with pytest.raises(ValueError, match="no pair"):
        settings(["ctranslate2"], ["bfloat16"], kvs)


class Twin:
    """A peer that is a second runner of ours."""

    def __init__(self, python, script):
        self.python, self.script, self.runner, self.orders = python, script, None, []

    def ask(self, do, **given):
        self.orders.append(do)
        if do == "open":
            self.runner = Runner(open_checkpoint(given["model"]), 200)
            return {"version": "twin"}
        if do == "logits":
            return {"logits": self.runner.logits(given["token_ids"]).tolist()}
        if do == "decode":
            return {"seconds": self.runner.decode(given["depth"], given["steps"])}
        return {"seconds": self.runner.prefill(given["num_tokens"])} if do == "prefill" else {}

    def close(self):
        self.runner = None


def test_peer_rows(monkeypatch):
    monkeypatch.setattr(peer_rows, "Peer", Twin)
    monkeypatch.setattr(peer_rows, "SHALLOW", 64)
    work = peer_rows.Work(depths=[100], attention=[128], prefills=[20], rounds=2, steps=2)
    rows = list(
        peer_rows.peer_rows(
            settings(["transformers"], ["bfloat16"], ["auto"]), work, python="python",
            shape="tiny", layers=2,
        )
    )  # fmt: skip
    assert [row["what"] for *_, row in rows] == ["decode", "prefill", "attention"]
    assert [row["layers"] for *_, row in rows] == [2, 2, 1]
    assert {row["version"] for *_, row in rows} == {"twin"}
    assert all(row["whole_bytes"] > row["bytes"] > 0 for *_, row in rows if row["what"] == "decode")
    with pytest.raises(ValueError, match="layers must be at least 2, got 1"):
        next(peer_rows.peer_rows([], work, python="python", shape="tiny", layers=1))


def test_two_models_that_differ_are_not_compared(monkeypatch):
    class Other(Twin):
        def ask(self, do, **given):
            answer = super().ask(do, **given)
            return {"logits": answer["logits"][::-1]} if do == "logits" else answer

    monkeypatch.setattr(peer_rows, "Peer", Other)
    work = peer_rows.Work(depths=[100], rounds=1, steps=1)
    with pytest.raises(RuntimeError, match="computes another model than ours"):
        list(
            peer_rows.peer_rows(
                settings(["transformers"], ["bfloat16"], ["auto"]), work, python="python",
                shape="tiny", layers=2,
            )
        )  # fmt: skip


def test_the_script_names_what_is_missing():
    code, err = script("--quick", "--peer-python", "/no/such/python")
    assert code == 1
    assert "--peer-python /no/such/python: No such file" in err
    code, err = script("--quick", "--peer", "ctranslate2", "--weights", "int8",
                       "--peer-python", fake_python_without_packages())  # fmt: skip
    assert code == 1
    assert "must be an interpreter with ctranslate2, transformers and torch" in err


def script(*words):
    command = [sys.executable, str(PEERS.with_name("bench_peers.py")), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stderr


def fake_python_without_packages():
    """An interpreter that sees no site-packages."""
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    return str(base if base.exists() else sys.executable)
