"""Decode steps and prompts of a whole model; `codellama-rt bench generate` runs the same rows.

pytest benchmarks/bench_generate.py --layers 4 --depth 1024,16384 --benchmark-json=generate.json
"""

import pytest
from conftest import names, numbers

from codellama_rt.tools.bench.generate_rows import Model, decode_row, prefill_row


def pytest_generate_tests(metafunc):
    config = metafunc.config
    models = [
        Model(None, config.getoption("--shape"), config.getoption("--layers"), weights, kv)
        for weights in names(config, "--weights")
        for kv in names(config, "--kv-dtype")
    ]
    if "model" in metafunc.fixturenames:
        ids = [f"{model.name}-{model.weights}-{model.kv_dtype}" for model in models]
        metafunc.parametrize("model", models, ids=ids, indirect=True, scope="module")
    for name, option in (("depth", "--depth"), ("num_tokens", "--prefill")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, numbers(config, option))


@pytest.fixture(scope="module")
def model(request):
    """Provide a model and its runner, for all depths and prompts."""
    config = request.config
    sizes = numbers(config, "--depth") + numbers(config, "--prefill")
    with request.param.runner(max(sizes)) as runner:
        yield request.param, runner


def test_decode(model, depth, request, limits, benchmark, watch):
    benchmark.group = "decode"
    steps = request.config.getoption("--steps")
    benchmark.extra_info.update(decode_row(*model, depth, steps, limits=limits, watch=watch))


def test_prefill(model, num_tokens, request, limits, benchmark, watch):
    benchmark.group = "prefill"
    rounds = request.config.getoption("--rounds")
    benchmark.extra_info.update(prefill_row(*model, num_tokens, rounds, limits=limits, watch=watch))
