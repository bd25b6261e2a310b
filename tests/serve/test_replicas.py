"""Several servers of one model: one is killed, and what it has computed is not lost with it.

The examples run where `.ci/clients DIR` has installed what they need.
"""

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.held_steps import holding
from helpers.served import request_bytes, serving, wait_for
from helpers.server_process import ServerProcess, ask, is_healthy, processes_with
from prometheus_client.parser import text_string_to_metric_families

from codellama_rt import SamplingParams

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "replicas"
SIZES = ("--kv-memory", "4MB", "--max-model-len", "2000")
PATH = "/v1/completions"
NUM_NEW = 20


def greedy(prompt, **fields):
    return {"prompt": prompt, "temperature": 0, "max_tokens": 30, "ignore_eos": True, **fields}


def text_of(answer):
    return answer["choices"][0]["text"]


@pytest.fixture(scope="module")
def text(llm):
    """What a prompt is to be continued with."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    return lambda prompt: llm.generate(prompt, params)[0].text


def test_one_of_two_is_killed_under_load(folder, text, tmp_path):
    """Whoever asks turns to the other one; the one that comes back finds the prefixes on disk."""
    prefixes = tmp_path / "prefixes"
    options = (*SIZES, "--prefix-cache-dir", str(prefixes))
    prompts = [f"class A{i}:\n    def f(self):\n        return {i}\n" * 8 for i in range(6)]
    expected = [text(prompt) for prompt in prompts]
    with (
        ServerProcess(folder, tmp_path / "first.log", *options) as first,
        ServerProcess(folder, tmp_path / "second.log", *options) as second,
    ):
        turns, is_over, answers = itertools.count(), threading.Event(), []

        def ask_one_or_the_other(i):
            servers = [first, second] if next(turns) % 2 else [second, first]
            for server in servers:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return text_of(server.post(PATH, greedy(prompts[i])))
            return None

        def load(i):
            while not is_over.is_set():
                answers.append((i, ask_one_or_the_other(i)))

        threads = [threading.Thread(target=load, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: len(answers) > 12)
            first.kill()
            new = [(i % 6, ask_one_or_the_other(i % 6)) for i in range(NUM_NEW)]
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        for i, found in (*answers, *new):
            assert found == expected[i]

        later = "def later(x):\n    return x\n" * 16  # only the second one has ever seen it
        before = num_files(prefixes)
        assert text_of(second.post(PATH, greedy(later))) == text(later)
        wait_for(lambda: num_files(prefixes) >= before + 3)
        first.restart()
        for prompt in (later, prompts[0]):
            answer = first.post(PATH, greedy(prompt))
            usage = answer["usage"]
            assert text_of(answer) == text(prompt)
            assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] // 2
        metrics = ask(first.port, "/metrics")[1].decode()
        assert float(re.search(r"external_prefix_cache_hits_total\{.*\} (\S+)", metrics)[1]) > 0


def test_the_metrics_that_llm_d_reads(open_llm):
    """The gateway's model server protocol: gauges of the queue and the KV cache, and its blocks."""
    with open_llm(max_num_seqs=2) as llm, serving(llm, metrics_prefix="vllm") as server:

        def metrics():
            text = server.get("/metrics").body.decode()
            return {one.name: one for one in text_string_to_metric_families(text)}

        def value(name):
            [sample] = metrics()[f"vllm:{name}"].samples
            return sample.value

        body = greedy("def f(", stream=True, n=8) | {"max_tokens": 1900}
        with server.connect() as connection, holding(llm.engine) as steps:
            connection.sendall(request_bytes(PATH, body))
            steps.allow(3)
            wait_for(lambda: steps.num_made == 3)
            assert value("num_requests_running") == 2
            assert value("num_requests_waiting") == 6
            assert 0 < value("kv_cache_usage_perc") <= 1
            found = metrics()
        server.wait_until_idle()
        assert value("num_requests_running") == value("num_requests_waiting") == 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert found[f"vllm:{name}"].type == "gauge"
        [sample] = found["vllm:cache_config_info"].samples
        assert sample.labels["block_size"] == str(llm.engine.kv_cache.block_size)
        assert sample.labels["num_gpu_blocks"] == str(llm.engine.kv_cache.num_blocks)


def num_files(folder):
    return sum(path.is_file() for path in folder.rglob("*"))


@contextlib.contextmanager
def running(script, client, mark, log, *options):
    """An example's process, with a client's programs, at a port that is free."""
    root = os.environ.get("CODELLAMA_RT_CLIENTS")
    if root is None:
        pytest.skip("no routers: .ci/clients DIR installs them and runs these tests")
    programs = Path(root, client, "bin")
    python = programs / "python" if client == "ray" else sys.executable
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(python), str(EXAMPLES / script), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **paths, "MARK": mark},
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()


def free_port():
    """A port that is free, and so are the two behind it."""
    while True:
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            first = sockets.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for port in (first + 1, first + 2):
                sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


RAY = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_AUTH_MODE": "disabled",
}
RUNS = {
    "with_vllm_router.py": ("vllm-router", b"\0codellama_rt\0serve\0", ()),
    "with_ray_serve.py": ("ray", b"ray::ServeReplica", ("--threads", "1")),
}


@pytest.mark.parametrize("script", RUNS)
def test_an_example(folder, text, tmp_path, monkeypatch, script):
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    client, command, options = RUNS[script]
    mark, port, log = f"example-{tmp_path}", free_port(), tmp_path / "log"
    words = [str(folder), "--port", str(port), "--prefix-cache-dir", str(tmp_path / "prefixes")]

    def replicas():
        return processes_with(mark, command)

    with running(script, client, mark, log, *words, *SIZES, *options) as process:
        wait_for(lambda: process.poll() is not None or is_healthy(port), 900)
        assert process.poll() is None, log.read_text()[-3000:]
        assert text_of(json.loads(ask(port, PATH, greedy("def f("))[1])) == text("def f(")
        body = ask(port, PATH, greedy("x = ", stream=True))[1].decode()
        events = [line[6:] for line in body.split("\n\n") if line.startswith("data: {")]
        assert "".join(text_of(json.loads(event)) for event in events) == text("x = ")
        assert body.endswith("data: [DONE]\n\n")
        fields = {"input_prefix": "def f(", "input_suffix": "):", "n_predict": 4}
        assert json.loads(ask(port, "/infill", fields)[1])["tokens_predicted"] == 4

        wait_for(lambda: len(replicas()) == 2, 120)
        before = replicas()
        os.kill(min(before), signal.SIGKILL)
        for i in range(NUM_NEW):
            status, answer = ask(port, PATH, greedy(f"def f{i}("))
            assert status == 200, answer
            assert text_of(json.loads(answer)) == text(f"def f{i}(")
        wait_for(lambda: len(replicas()) == 2 and replicas() != before, 120)
    wait_for(lambda: not replicas(), 120)
