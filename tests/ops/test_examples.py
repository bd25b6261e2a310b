"""The examples in docstrings run and show what they say; every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import codellama_rt
from codellama_rt import ops
from codellama_rt.ops import native as control
from codellama_rt.ops.schema import OPS

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(codellama_rt.__path__, "codellama_rt.")
    if not info.name.endswith(("._core", ".__main__")) and ".libcodellama_rt" not in info.name
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"np": np}, optionflags=FLAGS)
    assert failed == 0


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_an_example_that_runs(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(ops, name)))
    assert any(name in example.source for example in examples)
    assert not any(example.options.get(doctest.SKIP) for example in examples)


@pytest.mark.parametrize("name", sorted(set(codellama_rt.__all__) - {"__version__", "ops"}))
def test_every_public_name_has_an_example(name):
    value = getattr(codellama_rt, name)
    if isinstance(value, dict):
        pytest.skip("data")
    if inspect.isclass(value) and (
        issubclass(value, Exception) or name in ("Completion", "Output")
    ):
        pytest.skip("a record or an exception: got, not made, by callers")
    assert ">>> " in inspect.getdoc(value)


@pytest.mark.parametrize("function", [getattr(ops, name) for name in sorted(OPS)])
def test_docstrings_describe_every_argument(function):
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in text, parameter


def test_control_functions_are_documented():
    for name in control.__dict__:
        value = getattr(control, name)
        if inspect.isfunction(value) and value.__module__ == control.__name__:
            assert inspect.getdoc(value)
