"""Hostile programs: no pass, no process, no file and little memory is gained by any of them."""

import ctypes
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from helpers.hostile_programs import FORGED, GREEDY, LINGERING, MARK, MURDEROUS

from codellama_rt.tools.evaluation import execution
from codellama_rt.tools.evaluation.execution import FAILED, PASSED, TIMED_OUT, run_program

TIMEOUT_S = 1.0  # of programs that do not pass, and may run into it
PATIENCE_S = 60.0  # of those that pass: they need a fraction of a second of a CPU
MODES = ("as found", "no namespaces", "no namespaces, same user")


@pytest.fixture(params=MODES)
def mode(request, monkeypatch, tmp_path):
    """Take away, step by step, what the system gives for the separation of programs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if os.geteuid() == 0:  # a program's own user must reach its folder
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(0o711)
    if request.param != MODES[0]:
        monkeypatch.setattr(execution, "_prefix", tuple)
    if request.param == MODES[2]:
        monkeypatch.setattr(execution, "_users", lambda: None)
    return request.param


def ours():
    """Return the processes of this test's programs and their supervisors."""
    found, folder_of_programs = set(), tempfile.gettempdir().encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        is_supervisor = b"evaluation.supervisor" in words and folder_of_programs in words
        if is_supervisor or MARK.encode() in words:
            found.add(folder.name)
    return found


def landlock_version():
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)


class PeakOfMemory:
    """Growth of this process's resident memory while the block runs, in bytes."""

    def __enter__(self):
        self.first = self.peak = self._now()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._follow)
        self.watch.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.watch.join()
        self.growth = self.peak - self.first

    def _follow(self):
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def judged(program, folder, timeout_s=TIMEOUT_S):
    """Run a program and check that it is gone without a trace in time."""
    before, shared = ours(), set(os.listdir("/dev/shm"))
    began = time.monotonic()
    with PeakOfMemory() as memory:
        verdict = run_program(textwrap.dedent(program), timeout_s=timeout_s)
    assert time.monotonic() - began < timeout_s + 60  # most take less than a second more
    assert memory.growth < 2**26
    assert ours() <= before
    assert list(folder.iterdir()) == []
    assert {name for name in set(os.listdir("/dev/shm")) - shared if "program-" in name} == set()
    return verdict


@pytest.mark.parametrize("name", GREEDY)
def test_limits_hold(mode, name, tmp_path):
    if name == "files_of_shared_memory" and landlock_version() < 1:
        pytest.skip("this system does not forbid it")
    assert judged(GREEDY[name], tmp_path).result in (FAILED, TIMED_OUT)


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_is_not_forged(mode, name, tmp_path):
    if name.startswith("answer") and not Path("/proc/self/syscall").exists():
        pytest.skip("this system does not tell where a process waits")
    assert judged(FORGED[name], tmp_path).result in (FAILED, TIMED_OUT)


@pytest.mark.parametrize("name", MURDEROUS)
def test_others_live(mode, name, tmp_path):
    alone = execution._prefix() or execution._users()
    if not alone and landlock_version() < 6:
        pytest.skip("this system would let the program kill this test")
    verdict = judged(MURDEROUS[name], tmp_path)
    assert verdict.result in (FAILED, TIMED_OUT)
    assert "supervisor" not in verdict.reason


@pytest.mark.parametrize("name", LINGERING)
def test_nothing_goes_on(mode, name, tmp_path):
    assert judged(LINGERING[name], tmp_path, PATIENCE_S).result == PASSED


def test_programs_end_with_the_evaluator(mode, tmp_path):
    """Even when it is killed."""
    before = ours()
    lines = "import sys\nfrom codellama_rt.tools.evaluation import execution\n"
    if mode != MODES[0]:
        lines += "execution._prefix = tuple\n"
    if mode == MODES[2]:
        lines += "execution._users = lambda: None\n"
    program = "import os\nos.fork()\nos.setsid()\nwhile True: pass"
    lines += f"execution.run_program({program!r}, timeout_s=60)"
    evaluator = subprocess.Popen(
        [sys.executable, "-c", lines], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    while not ours() - before and evaluator.poll() is None:
        time.sleep(0.01)
    evaluator.kill()
    assert evaluator.wait() == -9
    deadline = time.monotonic() + 60
    while ours() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ours() <= before
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_supervised_is_an_error(monkeypatch):
    """It says nothing about the program."""
    monkeypatch.setattr(execution, "_prefix", lambda: ("false",))
    with pytest.raises(RuntimeError, match="supervisor failed"):
        run_program("pass")
