"""Pairs with other runtimes; `codellama-rt bench peers` runs the same rows.

    pytest benchmarks/bench_peers.py --peer-python PYTHON --depth 512 --benchmark-json=peers.json

One benchmark is one setting: pytest-benchmark times all of its turns together, and `extra_info`
holds the rows of the pairs.
"""

from conftest import names, numbers

from codellama_rt.tools.bench.pairs import METHOD
from codellama_rt.tools.bench.peer_rows import Work, peer_rows, settings


def pytest_generate_tests(metafunc):
    config = metafunc.config
    chosen = settings(
        names(config, "--peer"), names(config, "--weights"), names(config, "--kv-dtype")
    )
    metafunc.parametrize("setting", chosen, ids=[setting.peer_name for setting in chosen])


def test_pair(setting, request, limits, benchmark):
    config = request.config
    work = Work(
        numbers(config, "--depth"), numbers(config, "--attention"), numbers(config, "--prefill"),
        config.getoption("--rounds"), config.getoption("--steps"),
    )  # fmt: skip
    options = {
        "python": config.getoption("--peer-python"), "shape": config.getoption("--shape"),
        "layers": config.getoption("--layers"),
    }  # fmt: skip
    rows = benchmark.pedantic(lambda: [row for *_, row in peer_rows([setting], work, **options)])
    benchmark.extra_info.update(method=METHOD, machine=limits.describe(), rows=rows)
