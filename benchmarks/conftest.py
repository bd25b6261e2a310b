"""Run the rows of `codellama_rt.tools.bench` under pytest-benchmark.

    pytest benchmarks/bench_ops.py --op linear --tokens 1 --benchmark-json=ops.json

The options are those of `codellama-rt bench`; lists are separated by commas. Each benchmark's
`extra_info` is the row: bytes, FLOPs, limit, share, op, dtype, shape, instruction set, threads.
"""

import pytest

from codellama_rt import ops
from codellama_rt.tools.bench.measure import about
from codellama_rt.tools.limits import measure_limits

LISTS = {
    "--op": ("", "operators (default: all)"),
    "--shape": ("7b", "of bench_ops: models; of the others: one model"),
    "--dtype": ("bfloat16", "of bench_ops: of weights and cache"),
    "--isa": ("", "of bench_ops: instruction sets; the best by default"),
    "--tokens": ("1,16,512", "of bench_ops: of a step"),
    "--keys": ("2048,16384,100000", "of bench_ops: that attention reads"),
    "--weights": ("bfloat16", "of the others: of the model"),
    "--kv-dtype": ("bfloat16", "of the others: of the cache"),
    "--depth": ("1024,4096,16384", "of the others: of decode steps"),
    "--prefill": ("", "of the others: tokens of prompts"),
}


def pytest_addoption(parser):
    group = parser.getgroup("codellama-rt benchmarks")
    for name, (default, text) in LISTS.items():
        group.addoption(name, default=default, help=f"{text} (separated by commas)")
    group.addoption("--seconds", type=float, default=0.5, help="of bench_ops: spent on each row")
    group.addoption("--layers", type=int, default=4, help="of the model")
    group.addoption("--steps", type=int, default=32, help="decode steps per row")
    group.addoption("--rounds", type=int, default=5, help="prompts per row")
    group.addoption("--threads", type=int, help="per operator")


def pytest_configure(config):
    threads = config.getoption("--threads")
    if threads is not None:
        ops.set_num_threads(threads)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["codellama_rt"] = about()


def names(config, option):
    """Return the words of a list."""
    return [name for name in config.getoption(option).split(",") if name]


def numbers(config, option):
    """Return the numbers of a list."""
    return [int(name) for name in names(config, option)]


@pytest.fixture(scope="session")
def limits(request):
    """Measure the machine's limits and print them as the first line of a run."""
    found = measure_limits()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{found.describe()}")
    return found


@pytest.fixture
def watch(benchmark):
    """Return a `Stopwatch` that is pytest-benchmark's pedantic mode."""

    def time(work, setup, rounds):
        if benchmark.disabled:
            pytest.skip("benchmarks are disabled")
        benchmark.pedantic(work, setup=setup, rounds=rounds)
        return benchmark.stats.stats.data

    return time
