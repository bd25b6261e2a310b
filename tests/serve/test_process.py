"""`codellama-rt serve` as a process: how it begins, and how it ends."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from helpers.served import JSON, WAIT_S

from codellama_rt.cli import main as cli


@pytest.fixture
def start(folder):
    """Start a server with these options: the process, and its address."""
    processes = []

    def start_it(*options, env=None):
        command = [sys.executable, "-m", "codellama_rt", "serve", str(folder), "--port", "0"]
        command += ["--kv-memory", "4MB", "--max-model-len", "2000", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        processes.append(process)
        for line in process.stderr:
            if found := re.search(r"serving at http://([\d.]+):(\d+)", line):
                return process, (found[1], int(found[2]))
        raise AssertionError("it ended before it served")

    yield start_it
    for process in processes:
        process.kill()
        process.communicate()


def ask(address, path, body=None, headers=()):
    connection = http.client.HTTPConnection(*address, timeout=WAIT_S)
    method = "GET" if body is None else "POST"
    connection.request(method, path, body and json.dumps(body), {**JSON, **dict(headers)})
    return connection.getresponse()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end(start, number):
    process, address = start("--served-model-name", "codellama", "--drain-timeout", "600")
    assert json.load(ask(address, "/v1/models"))["data"][0]["id"] == "codellama"
    fields = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    stream = ask(address, "/v1/completions", fields)
    first = stream.read(20)
    process.send_signal(number)
    rest = first + stream.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in rest
    assert process.wait(WAIT_S) in (0, -number, 130)
    with pytest.raises(ConnectionRefusedError):
        ask(address, "/health")


def test_a_key_of_the_environment(start):
    _, address = start(env={**os.environ, "CODELLAMA_RT_API_KEY": "secret"})
    assert ask(address, "/health").status == 200
    assert ask(address, "/v1/models").status == 401
    assert ask(address, "/v1/models", headers={"x-api-key": "secret"}).status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--lora", "x"], "--lora takes NAME=DIR"),
        (["--drain-timeout", "0"], "--drain-timeout must be above 0"),
        (["--max-queued-tokens", "0"], "--max-queued-tokens must be at least 1"),
    ],
)
def test_wrong_options(folder, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        cli.app(["serve", str(folder), *options], prog_name="codellama-rt")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(folder, served, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["serve", str(folder), "--port", str(served.address[1])], prog_name="codellama-rt")
    assert ended.value.code == 2
    assert "in use" in capsys.readouterr().err
