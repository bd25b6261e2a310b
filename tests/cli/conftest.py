"""Small models for the command line, and a way to run it in this process."""

import io
import sys

import pytest
from helpers.tiny_llm import make_folder

from codellama_rt.cli import main as cli


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("cli_model") / "infilling"))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("cli_model") / "plain", infilling=False))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run_it(*args, stdin=None):
        stream = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as ended:
            cli.app([str(arg) for arg in args], prog_name="codellama-rt")
        return ended.value.code, *capsys.readouterr()

    return run_it
