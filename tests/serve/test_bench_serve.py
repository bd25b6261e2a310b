"""`codellama-rt bench serve`: loads of each kind on a server of a tiny model."""

import json

import pytest

from codellama_rt.cli import main as cli
from codellama_rt.tools.bench.http_stream import Endpoint
from codellama_rt.tools.bench.serving import Load, bodies, measure, summary


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.app(["bench", "serve", *map(str, words)], prog_name="codellama-rt")
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "words", [("--concurrency", 3), ("--rate", 200), ("--typing",), ("--shared-prefix", 60)]
)
def test_loads(served, capsys, tmp_path, words):
    sizes = ("--requests", 7, "--input-words", 20, "--output-tokens", 5)
    file = tmp_path / "found.json"
    code, out, _ = run(capsys, "--url", served.url, *sizes, *words, "--json", file)
    assert code == 0
    assert "7 requests in" in out
    found = json.loads(file.read_text())
    assert (found["completed"], found["failed"]) == (7, 0)
    assert found["total_output_tokens"] == 35
    assert 0 < found["median_ttft_ms"] <= found["p99_ttft_ms"]
    for name in ("request_throughput", "output_throughput", "mean_tpot_ms", "mean_itl_ms"):
        assert name in found
    if words[0] == "--shared-prefix":
        assert found["total_cached_tokens"] > 0


def test_the_same_seed_asks_the_same():
    assert list(bodies(Load(requests=3))) == list(bodies(Load(requests=3)))
    first, second, *_ = bodies(Load(requests=3, typing=True))
    assert second["prompt"].startswith(first["prompt"])
    assert len(second["prompt"]) == len(first["prompt"]) + 3
    assert first["suffix"] == second["suffix"]


def test_errors(served, capsys):
    code, _, err = run(capsys, "--url", served.url, "--model", "gpt-4", "--requests", 2)
    assert code == 2
    assert "404" in err
    code, _, err = run(capsys, "--url", "http://127.0.0.1:9", "--requests", 2)
    assert code == 2
    assert "no request was answered" in err
    with pytest.raises(ValueError, match="expected a URL"):
        Endpoint("ftp://x")


def test_the_python_interface(served):
    found = measure(Endpoint(served.url), Load(requests=2, input_words=3, output_tokens=2))
    assert found["completed"] == 2
    assert summary([], 1.0)["completed"] == 0
