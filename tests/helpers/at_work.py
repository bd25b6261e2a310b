"""Do something while the process that renders templates computes, however fast a machine is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from codellama_rt.text.chat import sandbox


@contextlib.contextmanager
def while_it_computes(action: Callable[[int], object]) -> Iterator[None]:
    """Call `action(pid)` in a thread once the process computes what is rendered first inside."""
    sandbox.render_template("", {})  # else it would compute for its start
    read, threads = sandbox._read, []

    def start_and_read(process, size):
        sandbox._read = read
        thread = threading.Thread(target=_act, args=(action, process.pid, _ticks(process.pid)))
        threads.append(thread)
        thread.start()
        return read(process, size)

    sandbox._read = start_and_read
    try:
        yield
    finally:
        sandbox._read = read
        for thread in threads:
            thread.join()


def _act(action: Callable[[int], object], pid: int, before: int) -> None:
    while _ticks(pid) <= before + 1:  # one may be of reading the request
        time.sleep(0.001)
    action(pid)


def _ticks(pid: int) -> int:
    """Return the time of the CPU that a process has had, as proc_pid_stat(5) counts it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
