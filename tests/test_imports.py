"""Imports go one way, and importing the package costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import codellama_rt

PACKAGE = Path(codellama_rt.__file__).parent
# From the top down. A module may import what stands below it, at any distance, never above it;
# `+` are further modules on the same step.
STEPS = [
    ["cli"],
    ["api", "causal_lm"],
    ["llm"],
    ["engine"],
    ["scheduler"],
    ["block_manager"],
    ["sequence"],
]
COMPUTATION = [["engine"], ["model", "graph_model"], ["kv_cache", "batch"], ["ops"]]
LEAVES = ["_core", "config", "dtypes", "errors", "memory", "rope", "sampling_params", "sampler",
          "cuda.device"]  # fmt: skip
LEAF_PACKAGES = {  # and what they use
    "ops": (), "checkpoint": ("ops", "quantize"), "chat": ("checkpoint", "ops", "quantize"),
    "tokenizer": ("checkpoint", "chat", "ops", "quantize"),
}  # fmt: skip
WITHOUT_TENSORS = ["scheduler", "block_manager", "sequence"]
HEAVY = [
    "mindspore", "sentencepiece", "tokenizers", "gguf", "jinja2", "typer", "rich", "protobuf",
    "huggingface_hub", "safetensors", "transformers", "torch",
]  # fmt: skip


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_by(name):
    """Absolute names of what a module imports anywhere in its source, functions included."""
    path, names = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return names


def graph():
    """Each module's direct imports within the package."""
    return {name: (imported_by(name) & MODULES.keys()) - {"codellama_rt"} for name in MODULES}


def reachable(start, edges):
    found, frontier = set(), {start}
    while frontier:
        found |= frontier
        frontier = set().union(*(edges[name] for name in frontier)) - found
    return found


def full(name):
    return f"codellama_rt.{name}"


@pytest.mark.parametrize("steps", [STEPS, COMPUTATION])
def test_nobody_imports_upwards(steps):
    edges = graph()
    for i, step in enumerate(steps):
        above = {full(name) for upper in steps[:i] for name in upper}
        for name in step:
            if full(name) in MODULES:
                assert not reachable(full(name), edges) & above, name


def test_each_step_imports_the_next():
    """The chain is the one DESIGN.md draws; a step that lost its neighbour would prove nothing."""
    edges = graph()
    for upper, lower in [("api", "llm"), ("llm", "engine"), ("engine", "scheduler"),
                         ("scheduler", "block_manager"), ("block_manager", "sequence"),
                         ("model", "ops"), ("kv_cache", "ops")]:  # fmt: skip
        assert full(lower) in edges[full(upper)], (upper, lower)


def test_there_is_no_cycle():
    edges = graph()
    for name in MODULES:
        assert not any(name in reachable(other, edges) for other in edges[name] - {name}), name


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_leaves_only(name):
    allowed = {full(leaf) for leaf in [*LEAVES, "config_fields"]}
    assert reachable(full(name), graph()) <= allowed


@pytest.mark.parametrize("package", LEAF_PACKAGES)
def test_leaf_packages_import_themselves_and_leaves(package):
    edges, allowed = graph(), {full(leaf) for leaf in [*LEAVES, "config_fields"]}
    inside = tuple(full(name) + "." for name in (package, *LEAF_PACKAGES[package]))
    for name in MODULES:
        if f"{name}.".startswith(full(package) + "."):
            outside = {m for m in reachable(name, edges) if not f"{m}.".startswith(inside)}
            assert outside <= allowed, name


@pytest.mark.parametrize("name", WITHOUT_TENSORS)
def test_scheduling_knows_no_tensors(name):
    assert not {n.split(".")[0] for n in imported_by(full(name))} & {"numpy", "mindspore"}


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, codellama_rt, codellama_rt.llm.generate, codellama_rt.llm.llm, "
        "codellama_rt.text.tokenizer, codellama_rt.text.chat;"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_importing_the_package_alone_imports_no_module_of_it():
    code = (
        "import sys, codellama_rt; print([n for n in sys.modules if n.startswith('codellama_rt.')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names():
    assert set(codellama_rt.__all__) <= set(dir(codellama_rt))
    for name in codellama_rt.__all__:
        assert getattr(codellama_rt, name) is not None
    with pytest.raises(AttributeError, match="module 'codellama_rt' has no attribute 'generatte'"):
        _ = codellama_rt.generatte
