"""Every op of the schema is in every place that docs/adding-an-operator.md names.

Where one is missing, the failure says which file to edit.
"""

import inspect
import re
from pathlib import Path

import pytest

import codellama_rt
from codellama_rt import ops
from codellama_rt.ops import reference
from codellama_rt.ops.schema import OPS
from codellama_rt.tools.bench.op_cases import Selection

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
OPS_DEF = (CSRC / "ops.def").read_text()
# (kind, name, struct of its kernel), one per line of ops.def.
LISTED = re.findall(r"^CLRT_(\w*)OP\((\w+), ?(\w*)", OPS_DEF, re.MULTILINE)
DIRECT_ONLY = {name for kind, name, _ in LISTED if kind == "DIRECT_"}


def file_of(module):
    return Path(inspect.getfile(module)).relative_to(REPOSITORY)


def missing(name, file, what):
    return f"{name} is missing: add {what} to {file} (docs/adding-an-operator.md)"


def defines(file, name):
    return re.search(rf"^void {name}\(", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", OPS)
def test_the_list_of_ops(name):
    assert name in [listed for _, listed, _ in LISTED], missing(name, "csrc/ops.def", "its line")


def test_the_list_has_no_other_ops():
    assert {name for _, name, _ in LISTED} - DIRECT_ONLY == set(OPS)


@pytest.mark.parametrize(("kind", "name", "params"), LISTED)
def test_kernel(kind, name, params):
    if kind == "COMPOSED_":  # has no kernel of its own
        return
    struct = f"struct {params} "
    assert struct in (CSRC / "ops.h").read_text(), missing(name, "csrc/ops.h", struct)
    kernels = [file for file in (CSRC / "cpu").glob("*/*.cc") if defines(file, name)]
    assert kernels, missing(name, f"csrc/cpu/ops/{name}.cc", "the kernel")


@pytest.mark.parametrize("name", OPS)
def test_launcher(name):
    launchers = [CSRC / "common" / "launch.cc", CSRC / "cpu" / "ops" / "decoder_layer.cc"]
    place = "csrc/common/launch.cc"
    assert any(defines(file, name) for file in launchers), missing(name, place, "the launcher")


@pytest.mark.parametrize("name", OPS)
def test_c_function(name):
    header = Path(codellama_rt.get_include()) / "codellama_rt.h"
    place = header.relative_to(REPOSITORY)
    assert f"}} codellama_rt_{name}_args;" in header.read_text(), missing(name, place, "its struct")
    assert f"int codellama_rt_{name}(" in header.read_text(), missing(name, place, "its function")
    functions = CSRC / "bind" / "c.cc"
    place = functions.relative_to(REPOSITORY)
    assert f"CLRT_C_OP({name})" in functions.read_text(), missing(name, place, "the C function")


@pytest.mark.parametrize("name", OPS)
def test_definition(name):
    assert hasattr(reference, name), missing(name, file_of(reference), "the definition in NumPy")


@pytest.mark.parametrize("name", OPS)
def test_direct_call(name):
    place = file_of(inspect.getmodule(ops.rms_norm))
    assert hasattr(ops, name), missing(name, place, "the direct call and its name in __all__")
    assert name in ops.__all__


@pytest.mark.parametrize("name", OPS)
def test_graph_op(name):
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    graph = ops.graph
    assert hasattr(graph, name), missing(name, file_of(graph), "the graph op")


@pytest.mark.parametrize("name", OPS)
def test_benchmark(name):
    place = file_of(inspect.getmodule(Selection))
    rows = list(Selection(ops=(name,), tokens=(1,), keys=(2048,)).cases())
    assert rows, missing(name, place, "a row")


@pytest.mark.parametrize("name", OPS)
def test_table(name):
    assert f"| `{name}` |" in (CSRC / "README.md").read_text(), (
        f"{name} is missing in csrc/README.md: run tools/generate_docs.py"
    )


@pytest.mark.parametrize("name", OPS)
def test_tests(name):
    file = f"tests/ops/test_{name}.py"
    assert (REPOSITORY / file).is_file(), missing(name, file, "its tests")
