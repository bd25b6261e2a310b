"""Stands where the compiled module is missing; Python prefers that one wherever it is there."""

from pathlib import Path

_package = Path(__file__).resolve().parent
_is_source_tree = (_package.parent / "CMakeLists.txt").is_file()
_remedy = (
    f"{_package.parent} is a source tree without compiled kernels: run `pip install -e .` in it, "
    "or start Python elsewhere to use the installed package"
    if _is_source_tree
    else "they were built for another Python than this one: install the package again with this one"
)
raise ImportError(f"codellama_rt has no kernels in {_package}; {_remedy}")
