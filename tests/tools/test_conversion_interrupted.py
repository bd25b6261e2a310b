"""Conversions that are killed, or whose source or journal changed: nothing half-written opens."""

import os
import random
import shutil
import signal
import sys
from functools import partial

import pytest
from helpers.checkpoint_files import TINY
from helpers.conversion_contents import contents, files

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats import tensor_file
from codellama_rt.errors import CheckpointError
from codellama_rt.tools.convert.convert import convert

TRIALS = 50


@pytest.fixture
def small_steps(monkeypatch):
    """Every tensor is a point to go on from; kills need no wait for the disk."""
    monkeypatch.setattr(tensor_file, "SYNC_BYTES", 1)
    monkeypatch.setattr(tensor_file.os, "fsync", lambda descriptor: None)


def killed_after(calls, action):
    """Runs an action in a process that is killed, as by kill -9, at its n-th call of a function;
    returns whether it was."""
    child = os.fork()
    if child == 0:
        left = calls

        def count(frame, event, argument):
            nonlocal left
            left -= event in ("call", "c_call")
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            action()
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def calls_of(action):
    """How many functions an action calls."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("name", "options"),
    [("meta", {}), ("in", {"to": "meta", "shards": 2}), ("meta", {"quantization": "int4"})],
    ids=["huggingface", "meta", "int4"],
)
def test_killed_anywhere_it_goes_on_and_nothing_half_written_opens(
    tmp_path, small_steps, name, options
):
    source = shutil.copytree(TINY / "gqa_theta1e6_bf16", tmp_path / "in")
    convert(source, tmp_path / "meta", to="meta", shards=2)
    source = tmp_path / name
    convert(source, tmp_path / "warm", **options)  # imports, of which the runs below have none
    total = calls_of(lambda: convert(source, tmp_path / "whole", **options))
    whole, rng = files(tmp_path / "whole"), random.Random(0)
    resumed = 0
    for trial in range(TRIALS):
        folder = tmp_path / f"{trial}"
        out = folder / "out"
        run = partial(convert, source, out, **options)
        assert killed_after(rng.randrange(1, total), run)
        for found in (out, folder / ".out.partial" / "out"):
            if found.exists() and {"config.json", "params.json"} & set(os.listdir(found)):
                assert files(found) == whole or not opens(found)
            elif found.exists():
                assert not opens(found)
        if not out.exists():
            said = []
            convert(source, out, **options, progress=lambda *call, said=said: said.append(call[2]))
            resumed += said.count("resuming") > 0
            assert [entry.name for entry in folder.iterdir()] == ["out"]
        assert files(out) == whole
    assert resumed >= TRIALS // 10


def opens(folder):
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def test_a_changed_source_is_converted_anew(tmp_path, small_steps):
    source = shutil.copytree(TINY / "gqa_theta1e6_bf16", tmp_path / "in")

    class Stopped(BaseException):
        pass

    def stop(done, total, what):
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", to="meta", progress=stop)
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (source / "model.safetensors").write_bytes(raw)
    said = []
    convert(source, tmp_path / "out", to="meta", progress=lambda *call: said.append(call[2]))
    assert set(said) == {"copying"}
    convert(tmp_path / "out", tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(source)


@pytest.mark.parametrize("tail", [b'{"file": "consoli', b'{"file": 3}\n', b"\xff\n"])
def test_a_damaged_journal(tmp_path, small_steps, tail):
    source, out = TINY / "gqa_theta1e6_bf16", tmp_path / "out"
    convert(source, tmp_path / "warm", to="meta")
    total = calls_of(lambda: convert(source, tmp_path / "whole", to="meta"))
    assert killed_after(total * 2 // 3, lambda: convert(source, out, to="meta"))
    with open(tmp_path / ".out.partial" / "journal", "ab") as file:
        file.write(tail)
    convert(source, out, to="meta")
    assert files(out) == files(tmp_path / "whole")
