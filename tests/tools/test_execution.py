"""Programs that a model might write: judged by their ends, and held by limits."""

import os
from pathlib import Path

import pytest

from codellama_rt.tools.evaluation.execution import (
    FAILED,
    PASSED,
    TIMED_OUT,
    is_isolated,
    run_program,
)


def test_programs_that_end_well():
    assert run_program("assert sum(range(5)) == 10").result == PASSED
    assert run_program("print('x' * 10**6); import sys; sys.stdin.read()").result == PASSED


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("exit()", "Error|SystemExit"),
        ("import os; os._exit(0)", "ended by a limit"),
        ("import ctypes; ctypes.string_at(0)", "ended by a limit"),
        ("print('passed'); 1 / 0", "ZeroDivisionError"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**25))", "OSError|ended by a limit"),
        ("f = [open('/dev/null') for _ in range(100)]", "OSError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_programs_that_fail(program, reason):
    import re

    verdict = run_program(program, timeout_s=30)
    assert verdict.result == FAILED
    assert re.search(reason, verdict.reason), verdict


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_programs_without_an_end(program):
    assert run_program(program, timeout_s=1.5).result == TIMED_OUT


def test_a_program_works_in_a_folder_of_its_own():
    program = (
        "import os, pathlib\n"
        "assert os.listdir() == []\n"
        "pathlib.Path('file').write_text('x')\n"
        "assert os.environ['HOME'] == os.getcwd()\n"
        "assert 'SECRET' not in os.environ\n"
    )
    os.environ["SECRET"] = "s"
    try:
        before = set(Path.cwd().iterdir())
        assert run_program(program) == run_program(program)
        assert run_program(program).result == PASSED
        assert set(Path.cwd().iterdir()) == before
    finally:
        del os.environ["SECRET"]


@pytest.mark.skipif(not is_isolated(), reason="this system gives no network namespaces")
def test_there_is_no_network():
    program = (
        "import socket\n"
        "assert [name for _, name in socket.if_nameindex()] == ['lo']\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', 9), timeout=2)\n"
        "except OSError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    assert run_program(program).result == PASSED
