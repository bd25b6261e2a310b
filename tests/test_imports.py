"""Every module stands in one room, rooms import downwards only, and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import codellama_rt

PACKAGE = Path(codellama_rt.__file__).parent
# From the bottom up. A room imports itself and lower rooms, at any distance; two rooms of one step
# never import each other. Imports inside functions and under TYPE_CHECKING count.
ROOMS = [
    ["errors"],
    ["ops"],
    ["model"],
    ["engine", "checkpoint"],
    ["text"],
    ["llm"],
    ["hf", "serve", "tools"],
    ["cli"],
    ["__main__"],
]
STEP = {room: step for step, rooms in enumerate(ROOMS) for room in rooms}
MAX_TOP_LEVEL_ENTRIES = 12
MAX_MODULES_OF_ENGINE = 46
DEVICES = ("codellama_rt.model.cuda", "codellama_rt.model.ascend", "codellama_rt.model.llama_graph")
WITHOUT_TENSORS = ["scheduler", "block_manager", "sequence"]
HEAVY = [
    "mindspore",
    "sentencepiece",
    "tokenizers",
    "gguf",
    "jinja2",
    "typer",
    "rich",
    "protobuf",
    "huggingface_hub",
    "safetensors",
    "transformers",
    "torch",
    "llguidance",
    "starlette",
    "uvicorn",
    "msgspec",
    "prometheus_client",
]


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


GRAPH = {name: (imported_by(name) & MODULES.keys()) - {"codellama_rt"} for name in MODULES}


def room(name):
    return name.split(".")[1]


def reachable(start, edges):
    found, frontier = set(), {start}
    while frontier:
        found |= frontier
        frontier = set().union(*(edges[name] for name in frontier)) - found
    return found


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def loaded_by(statement):
    """The package's modules that a statement loads in a fresh interpreter."""
    listing = "[n for n in sys.modules if n.split('.')[0] == 'codellama_rt']"
    return run(f"import sys\n{statement}\nprint(*{listing})").split()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "codellama_rt"])
def test_a_room_imports_itself_and_lower_rooms(name):
    assert room(name) in STEP, f"{name}: {room(name)} is in no step of the table above"
    for imported in GRAPH[name]:
        is_lower = STEP[room(imported)] < STEP[room(name)]
        assert is_lower or room(imported) == room(name), f"{name} imports {imported}"


def test_the_top_level_can_be_seen_at_a_glance():
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    entries = {path.name for path in [*PACKAGE.glob("*.py"), *rooms]}
    entries.remove("__main__.py")  # a line that calls cli
    assert len(entries) <= MAX_TOP_LEVEL_ENTRIES, sorted(entries)


def test_every_room_is_used_by_the_one_above():
    """A room that lost its neighbour would prove nothing."""
    edges = {(room(a), room(b)) for a in GRAPH if a != "codellama_rt" for b in GRAPH[a]}
    chain = [("model", "ops"), ("engine", "model"), ("checkpoint", "model"), ("llm", "engine"),
             ("llm", "checkpoint"), ("llm", "text"), ("hf", "llm"), ("cli", "llm"),
             ("serve", "llm"), ("cli", "serve")]  # fmt: skip
    assert set(chain) <= edges


def test_there_is_no_cycle():
    for name in MODULES:
        assert not any(name in reachable(other, GRAPH) for other in GRAPH[name] - {name}), name


def test_the_model_knows_no_device_but_the_cpu():
    for name in MODULES:
        if name.startswith("codellama_rt.model.") and not name.startswith(DEVICES):
            assert not [n for n in GRAPH[name] if n.startswith(DEVICES)], name
    users = {name for name in MODULES if any(n.startswith(DEVICES) for n in GRAPH[name])}
    users -= {name for name in users if name.startswith(DEVICES)}
    assert users <= {"codellama_rt.llm.placement"}, users


def test_the_compiled_modules_have_one_importer():
    for name, path in MODULES.items():
        imported = {
            n for n in imported_by(name) if n in ("codellama_rt._core", "codellama_rt._cuda")
        }
        allowed = {"codellama_rt._core"} if path.name == "native.py" else set()
        assert imported <= allowed, name


@pytest.mark.parametrize("name", WITHOUT_TENSORS)
def test_scheduling_knows_no_tensors(name):
    names = {n.split(".")[0] for n in imported_by(f"codellama_rt.engine.{name}")}
    assert not names & {"numpy", "mindspore"}


def test_importing_the_engine_loads_the_core_alone():
    loaded = loaded_by("import codellama_rt.engine.engine")
    assert len(loaded) <= MAX_MODULES_OF_ENGINE, sorted(loaded)
    assert {room(name) for name in loaded if "." in name} <= {
        "errors",
        "ops",
        "model",
        "engine",
        "_core",
    }


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, codellama_rt, codellama_rt.llm.generate, codellama_rt.llm.llm, "
        "codellama_rt.text.tokenizer, codellama_rt.text.chat;"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_importing_the_package_alone_imports_no_module_of_it():
    assert loaded_by("import codellama_rt") == ["codellama_rt"]


def test_public_names():
    assert set(codellama_rt.__all__) <= set(dir(codellama_rt))
    for name in codellama_rt.__all__:
        assert getattr(codellama_rt, name) is not None
    with pytest.raises(AttributeError, match="module 'codellama_rt' has no attribute 'generatte'"):
        _ = codellama_rt.generatte
