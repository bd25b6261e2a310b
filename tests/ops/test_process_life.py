"""Threads that end, fail or cannot start: the process goes on, or ends as it would without them."""

import os
import subprocess
import sys

import pytest

OPS_IN_THREADS = """
import sys, threading, time
from itertools import repeat
import numpy as np
from codellama_rt import ops
ops.set_num_threads(int(sys.argv[1]))
x, weight = np.ones((4, 1024), np.float32), np.ones((1024, 1024), np.float32)
query, cache = np.ones((64, 8, 64), np.float32), np.ones((64, 8, 16, 64), np.float32)
table, length = np.arange(64, dtype=np.int32)[None], np.array([1000], np.int32)
calls = [
    lambda: ops.linear(x, weight), lambda: ops.rms_norm(weight, x[0]),
    lambda: ops.silu_and_mul(weight), lambda: ops.quantize(weight, "int8"),
    lambda: ops.paged_attention(query, cache, cache, table, length, np.array([0, 64], np.int32)),
]
"""
EXIT_INSIDE = (
    OPS_IN_THREADS
    + """
def repeat_for_ever(call):
    for _ in repeat(None):
        call()

for call in calls:
    threading.Thread(target=repeat_for_ever, args=(call,), daemon=True).start()
time.sleep(0.1)
"""
)


def python(code, *arguments, **environment):
    """Run code in a new interpreter; return its exit status and output."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return result.returncode, result.stdout.strip() + result.stderr.strip()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_interpreter_ends_while_daemon_threads_are_inside_ops(num_threads):
    assert [python(EXIT_INSIDE, num_threads) for _ in range(6)] == [(0, "")] * 6


THREADS_REFUSED = """
import os, resource, time
import numpy as np
from codellama_rt import ops
x = np.ones((20, 300), np.float32)
expected = ops.linear(x, x)
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)  # stacks of some hundred threads
before = len(os.listdir("/proc/self/task"))
for too_many in (200_000, 100_000):  # with a pool before it, and without
    ops.set_num_threads(too_many)
    for _ in range(2):
        try:
            ops.linear(x, x)
        except RuntimeError as error:
            assert f"of num_threads={too_many} cannot be started" in str(error), error
            assert "CODELLAMA_RT_NUM_THREADS" in str(error), error
        else:
            raise AssertionError("so many threads were started")
        while len(os.listdir("/proc/self/task")) > before:  # one that was joined is still ending
            time.sleep(0.001)
for count in (3, 1, 2):
    ops.set_num_threads(count)
    assert np.array_equal(ops.linear(x, x), expected)
"""


def test_threads_that_cannot_be_started_are_an_error_and_fewer_work():
    assert python(THREADS_REFUSED) == (0, "")


# A thread keeps its scratch memory, here 117 MB: more than any hole in the heap, so a thread that
# has none must ask the system, which refuses. The caller has its own from a call on one thread, so
# only a worker asks. Workers come when a CPU is free: the call is repeated until one has come.
MEMORY_REFUSED = """
import os, resource
import numpy as np
from codellama_rt import ops
logits, rows = np.zeros((1, 1 << 22), np.float32), np.zeros(16, np.int32)
small = np.ones((20, 300), np.float32)
ops.set_num_threads(4)
ops.linear(small, small)  # starts the workers
expected = ops.sample(logits, rows=rows, num_threads=1).token_ids
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
while True:
    try:
        ops.sample(logits, rows=rows)
    except MemoryError:
        break
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert np.array_equal(ops.sample(logits, rows=rows).token_ids, expected)
"""


def test_memory_that_a_worker_cannot_have_is_an_error_of_the_call():
    assert python(MEMORY_REFUSED) == (0, "")


THREADS_CHANGING = (
    OPS_IN_THREADS
    + """
expected = [np.asarray(getattr(r := call(), "payload", r[0] if isinstance(r, tuple) else r)).copy()
            for call in calls]
wrong, ended = [], threading.Event()

def change():
    while not ended.is_set():
        for count in (1, 4, 2, 7):
            ops.set_num_threads(count)

def work(i):
    for _ in range(30):
        result = calls[i]()
        result = result[0] if isinstance(result, tuple) else getattr(result, "payload", result)
        if result.tobytes() != expected[i].tobytes():
            wrong.append(i)

changer = threading.Thread(target=change)
workers = [threading.Thread(target=work, args=(i % len(calls),)) for i in range(8)]
for thread in (changer, *workers):
    thread.start()
for worker in workers:
    worker.join()
ended.set()
changer.join()
assert not wrong, wrong
"""
)


def test_the_number_of_threads_may_change_while_others_call():
    assert python(THREADS_CHANGING, 2) == (0, "")


FORKED_INSIDE = (
    OPS_IN_THREADS
    + """
import os, warnings
warnings.simplefilter("ignore")  # Python 3.12 and later: a process with threads is forked
expected = ops.linear(x, weight).tobytes()
ended = threading.Event()

def work(call):
    while not ended.is_set():
        call()

workers = [threading.Thread(target=work, args=(call,)) for call in calls]
for worker in workers:
    worker.start()
for _ in range(10):
    child = os.fork()
    if child == 0:  # twice: with a pool of its own
        same = all(ops.linear(x, weight).tobytes() == expected for _ in range(2))
        pool = len(os.listdir("/proc/self/task")) == ops.num_threads()
        os._exit(0 if same and pool else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
ended.set()
for worker in workers:
    worker.join()
"""
)


def test_a_fork_while_other_threads_are_inside_ops():
    assert python(FORKED_INSIDE, 3) == (0, "")
