"""`codellama-rt serve` as a process of its own, which a test may kill."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.served import JSON, WAIT_S, wait_for


class ServerProcess:
    """Serves a model from the beginning of the `with` block; `restart` is another beginning.

    Args:
        folder: the model.
        log: a file for what it writes.
        options: of `codellama-rt serve`.
    """

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "codellama_rt", "serve", str(folder), *options]
        self._log, self.port = log, 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> ServerProcess:
        self.restart()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def restart(self) -> None:
        """Start it, at the port that it had, and wait until it serves."""
        with self._log.open("w") as log:
            command = [*self._command, "--port", str(self.port)]
            self.process = subprocess.Popen(command, stderr=log)
        wait_for(self._is_ready)

    def kill(self) -> None:
        """End it at once, as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask, and return what JSON the answer has.

        Raises:
            OSError, HTTPException: there is no server, or it has gone.
        """
        status, answer = ask(self.port, path, body)
        assert status == 200, answer
        return json.loads(answer)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        found = re.search(r"serving at http://[\d.]+:(\d+)", self._log.read_text())
        if not found:
            return False
        self.port = int(found[1])
        return is_healthy(self.port)


def is_healthy(port: int) -> bool:
    """Whether a server answers that its model is served."""
    try:
        return ask(port, "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def ask(port: int, path: str, body: Any = None) -> tuple[int, bytes]:
    """Return the status and the body of an answer; raises as `ServerProcess.post`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("POST" if body else "GET", path, body and json.dumps(body), JSON)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def processes_with(mark: str, words: bytes) -> set[int]:
    """Return the ids of processes with a text in their environment, and words in their command."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            has_words = words in (folder / "cmdline").read_bytes()
            if has_words and mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found
