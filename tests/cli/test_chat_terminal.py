"""`codellama-rt chat` on a real terminal: pastes, Tab, what is told at the end of an answer."""

import json
import os
import pty
import select
import sys
import time

import pytest

OPTIONS = ("--max-new-tokens", "3", "--ignore-eos", "--temperature", "0", "--kv-memory", "4MB")
BEGIN_PASTE, END_PASTE = "\x1b[200~", "\x1b[201~"
QUESTION = ">>> "


class Terminal:
    """A process whose stdin, stdout and stderr are one terminal."""

    def __init__(self, *words, **environment):
        self.shown = ""
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-m", "codellama_rt", *map(str, words)])

    def wait_for(self, text, seconds=60):
        """Return what is shown up to the next occurrence of a text."""
        end = time.monotonic() + seconds
        while text not in self.shown and time.monotonic() < end and self._read():
            pass
        assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self._file, text.encode())

    def exit_code(self):
        while self._read():
            pass
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self):
        select.select([self._file], [], [], 60)
        try:
            raw = os.read(self._file, 65536)
        except OSError:  # the process has ended
            return False
        self.shown += raw.decode("utf-8", "replace")
        return bool(raw)


@pytest.fixture
def history(tmp_path):
    return tmp_path / "history.json"


@pytest.fixture
def chat(model, history):
    def start(**environment):
        words = ("chat", model, *OPTIONS, "--history", history)
        terminal = Terminal(*words, **{"TERM": "xterm", **environment})
        terminal.wait_for(QUESTION)
        return terminal

    return start


def questions(history):
    return [said["content"] for said in json.loads(history.read_text()) if said["role"] == "user"]


def test_a_marked_paste_is_one_message(chat, history):
    terminal = chat()
    terminal.type(f"{BEGIN_PASTE}/* a */\r\rdef f(x):\r\treturn x{END_PASTE}")
    terminal.wait_for("return x")
    terminal.type("\r")
    terminal.wait_for(QUESTION)
    terminal.type("print\r")
    terminal.wait_for(QUESTION)
    terminal.type("/bye\r")
    assert terminal.exit_code() == 0
    assert questions(history) == ["/* a */\n\ndef f(x):\n\treturn x", "print"]


def test_an_unmarked_paste_is_one_message(chat, history):
    terminal = chat(TERM="dumb")
    terminal.type("def f(x):\r\r\treturn x\r")
    terminal.wait_for("[cut after 3 tokens")
    terminal.wait_for(QUESTION)
    terminal.type("/exit\r")
    assert terminal.exit_code() == 0
    assert questions(history) == ["def f(x):\n\n\treturn x"]


def test_tab_completes_commands(chat, history):
    terminal = chat()
    terminal.type("add\r")
    terminal.wait_for(QUESTION)
    terminal.type("/sta\t\r")
    terminal.wait_for("last answer")
    terminal.wait_for(QUESTION)
    terminal.type("/set temp\t0.5\r")
    terminal.wait_for("temperature = 0.5")
    terminal.wait_for(QUESTION)
    terminal.type("/by\t\r")
    assert terminal.exit_code() == 0
