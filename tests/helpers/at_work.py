"""Do something while the process that renders templates computes, however fast a machine is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from codellama_rt.text.chat import sandbox


@contextlib.contextmanager
def while_it_computes(action: Callable[[int], object]) -> Iterator[None]:
    """Call `action(pid)` in a thread once the process computes what is rendered first inside."""
    sandbox.render_template("", {})  # else it would compute for its start
    read, threads, is_over = sandbox._read, [], threading.Event()

    def start_and_read(process, size):
        sandbox._read = read
        arguments = action, process.pid, _ticks(process.pid), is_over
        thread = threading.Thread(target=_act, args=arguments)
        threads.append(thread)
        thread.start()
        return read(process, size)

    sandbox._read = start_and_read
    try:
        yield
    finally:
        sandbox._read = read
        is_over.set()
        for thread in threads:
            thread.join()


def _act(action: Callable[[int], object], pid: int, before: int, is_over: threading.Event) -> None:
    while _ticks(pid) <= before + 1:  # one may be of reading the request
        if is_over.wait(0.001):
            return
    action(pid)


def _ticks(pid: int) -> int:
    """Return the time of the CPU that a process has had, as proc_pid_stat(5) counts it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
