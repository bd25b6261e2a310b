"""Building and importing: what is missing is told in one sentence."""

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools

import codellama_rt

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = Path(codellama_rt.__file__).parent


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, without what it would set up."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(REPOSITORY / "setup.py"))


def sentence(error):
    """What pip shows: one line that ends with what to do."""
    message = str(error.value.code)
    assert message.startswith("codellama_rt: ")
    assert "\n" not in message
    assert message.endswith("and try again.")
    return message


def test_a_missing_cmake_is_told(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        setup_py["find_cmake"]()
    assert "no cmake" in sentence(error)
    assert "pip install cmake" in sentence(error)


def test_a_missing_compiler_is_told(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as error:
        setup_py["require_compiler"]()
    assert "no C++17 compiler found (c++, g++, clang++)" in sentence(error)


def test_a_compiler_named_and_missing_is_told(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit) as error:
        setup_py["require_compiler"]()
    assert "(no-such-compiler)" in sentence(error)


def test_any_compiler_will_do(setup_py, monkeypatch, tmp_path):
    compiler = tmp_path / "clang++"
    compiler.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    setup_py["require_compiler"]()
    monkeypatch.setenv("CXX", str(compiler))
    setup_py["require_compiler"]()


def copy_of_package(folder):
    """The Python files of the package as they lie in a source tree, and nothing compiled."""
    shutil.copytree(
        PACKAGE, folder / "codellama_rt", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder


def import_ops(folder):
    command = [sys.executable, "-c", "import codellama_rt; codellama_rt.ops"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_source_tree_that_is_not_built_says_what_to_do(tmp_path):
    (copy_of_package(tmp_path) / "CMakeLists.txt").touch()
    result = import_ops(tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: codellama_rt has no kernels (_core) in {tmp_path}/")
    assert "pip install -e ." in last


def test_a_package_built_for_another_python_says_so(tmp_path):
    result = import_ops(copy_of_package(tmp_path))
    assert "built for another Python" in result.stderr.splitlines()[-1]


def test_the_compiled_module_is_preferred():
    from codellama_rt import _core

    assert _core.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))


def test_the_library_is_free_of_python_and_mindspore():
    library = PACKAGE / "libcodellama_rt_cpu.so"
    symbols = subprocess.run(
        ["nm", "--dynamic", str(library)], capture_output=True, text=True, check=True
    ).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
    assert undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py")) or "mindspore" in name]


def test_the_version_is_written_once_more_alone():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'\nversion = "{codellama_rt.__version__}"\n' in text
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"\n## {codellama_rt.__version__}" in changes
