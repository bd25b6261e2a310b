"""Every operator at Code Llama's shapes; `codellama-rt bench ops` runs the same rows.

    pytest benchmarks/bench_ops.py --shape 7b --dtype bfloat16 --benchmark-json=ops.json

Each operator is checked against the reference before it is timed; its buffers are used in turn and
exceed any cache.
"""

import pytest
from conftest import names, numbers

from codellama_rt import ops
from codellama_rt.tools.bench.op_cases import Selection
from codellama_rt.tools.bench.op_rows import op_row


def pytest_generate_tests(metafunc):
    config = metafunc.config
    selection = Selection(
        names(config, "--op"),
        names(config, "--shape"),
        names(config, "--dtype"),
        numbers(config, "--tokens"),
        numbers(config, "--keys"),
    )
    isas = names(config, "--isa") or [ops.isa()]
    rows = [
        pytest.param(isa, case, id=f"{case.op.name}-{case.model}-{case.label}-{case.dtype}-{isa}")
        for isa in isas
        for case in selection.cases()
    ]
    metafunc.parametrize("isa, case", rows)


@pytest.fixture
def _isa(isa):
    before = ops.isa()
    ops.set_isa(isa)
    yield
    ops.set_isa(before)


@pytest.mark.usefixtures("_isa", "limits")
def test_op(case, request, benchmark, watch):
    benchmark.group = f"{case.op.name} {case.dtype}"
    seconds = request.config.getoption("--seconds")
    benchmark.extra_info.update(op_row(case, seconds, watch))
