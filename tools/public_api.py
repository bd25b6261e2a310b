"""Write the public surface as text: signatures, first lines of docstrings, help of the commands.

`tests/data/public_api.txt` holds the expected output, and a test compares the two, so that no
public name, parameter or option changes unnoticed. `--write` updates that file.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import typer
from typer.testing import CliRunner

import codellama_rt

SNAPSHOT = Path(__file__).resolve().parent.parent / "tests" / "data" / "public_api.txt"
HELP_WIDTH = "100"


def surface() -> str:
    """Return the whole surface, one line per name or option."""
    from codellama_rt.cli.main import app

    lines = [*_names("clrt", codellama_rt, codellama_rt.__all__)]
    for name in ("ops", "ops.graph", "ops.ascend", "ops.ascend_graph"):
        lines += _names(f"clrt.{name}", _module(name), _public(_module(name)))
    for words in _commands(typer.main.get_command(app), []):
        lines += ["", f"$ {' '.join(['codellama-rt', *words, '--help'])}", *_help(app, words)]
    return "\n".join(lines) + "\n"


def _module(dotted: str) -> ModuleType:
    found = codellama_rt
    for name in dotted.split("."):
        found = getattr(found, name, None) or import_module(f"{found.__name__}.{name}")
    return found


def _public(module: ModuleType) -> list[str]:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
        if (getattr(value, "__module__", None) or "") == module.__name__
    ]
    return sorted(getattr(module, "__all__", own))


def _names(prefix: str, owner: ModuleType, names: list[str]) -> Iterator[str]:
    for name in sorted(names):
        value = getattr(owner, name)
        if not isinstance(value, ModuleType):
            yield ""
            yield from _describe(f"{prefix}.{name}", value)


def _describe(name: str, value: object) -> Iterator[str]:
    if not callable(value):
        yield f"{name}: {type(value).__name__}"
        return
    yield f"{name}{_signature(value)}"
    yield f"    {_head(value)}"
    if inspect.isclass(value):
        for member, what in sorted(_members(value).items()):
            yield f"  .{member}{'' if isinstance(what, property) else _signature(what)}"
            yield f"    {_head(what)}"


def _members(owner: type) -> dict[str, object]:
    """Return the public methods and properties of this package's classes, including inherited."""
    found: dict[str, object] = {}
    for base in reversed(owner.__mro__):
        if base.__module__.startswith("codellama_rt"):
            found |= {name: what for name, what in vars(base).items() if not name.startswith("_")}
    kinds = (staticmethod, classmethod, property)
    return {name: what for name, what in found.items() if callable(what) or isinstance(what, kinds)}


def _signature(value: object) -> str:
    try:
        text = str(inspect.signature(getattr(value, "__func__", value)))
    except (TypeError, ValueError):
        return "(...)"
    text = re.sub(r"codellama_rt[\w.]*\.(\w+)", r"\1", text)  # modules of classes are not public
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _head(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")


def _commands(command: object, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(child, [*words, name])


def _help(app: typer.Typer, words: list[str]) -> list[str]:
    environment = {"COLUMNS": HELP_WIDTH, "TERMINAL_WIDTH": HELP_WIDTH, "NO_COLOR": "1"}
    runner = CliRunner(env=environment)
    result = runner.invoke(app, [*words, "--help"], prog_name="codellama-rt")
    if result.exit_code:
        raise SystemExit(f"{' '.join(words)} --help: {result.output}")
    return [line.rstrip() for line in result.output.splitlines()]


def main() -> None:
    """Print the surface, or write it to the test's file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="update the test's file")
    if parser.parse_args().write:
        SNAPSHOT.write_text(surface(), encoding="utf-8")
    else:
        sys.stdout.write(surface())


if __name__ == "__main__":
    main()
