"""The documents: their commands and examples run, their tables and links are current."""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.adapter_files import write_adapter
from helpers.checkpoint_files import MINI_CONFIG, write_mini
from helpers.evaluation_problems import PROBLEMS
from helpers.mbpp_problems import write_mbpp
from helpers.quantized_models import q8_model
from helpers.tiny_llm import make_folder
from helpers.tokenizer_files import model_file, sentencepiece_model
from sentencepiece import sentencepiece_model_pb2 as pb

import codellama_rt as clrt
from codellama_rt.checkpoint.tensor_names import expected_shapes
from codellama_rt.cli import main as cli
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.schema import OPS
from codellama_rt.tools.convert.convert import convert
from codellama_rt.tools.evaluation import humaneval, infilling

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((REPOSITORY / "docs").rglob("*.md")),
        *(REPOSITORY / "csrc" / name for name in ("README.md", "ascend/README.md")),
    )
}
README = DOCUMENTS["README.md"]
MODELS = ("CodeLlama-7b-hf", "CodeLlama-7b-Instruct-hf", "smollm2-135m-instruct")
CONVERTED = "CodeLlama-7b-int4"  # what a line of the documents made, and the next one uses
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a shell block, with the document it stands in."""
    for name, document in DOCUMENTS.items():
        lines = "".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
        for line in lines:
            words, command = shlex.split(line, comments=True), []
            for word in [*words, "&&"]:
                if word != "&&":
                    command.append(word)
                elif command:
                    yield name, command
                    command = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of as many ids as its tokenizer has pieces: any id it draws can be decoded."""
    pieces = pb.ModelProto.FromString(sentencepiece_model()).pieces
    config = {
        "vocab_size": len(pieces), "max_position_embeddings": 1024, "hidden_size": 64,
        "intermediate_size": 128, "head_dim": 32,
    }  # fmt: skip
    shapes = expected_shapes(ModelConfig.from_hf(MINI_CONFIG | config))
    rng = np.random.default_rng(5)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    path = write_mini(tmp_path_factory.mktemp("docs") / "model", tensors, **config)
    model_file(path)
    write_adapter(path.parent / "lora", ModelConfig.from_hf(MINI_CONFIG | config))
    return str(path)


@pytest.fixture
def desk(folder, tmp_path, monkeypatch):
    """Work in a folder with the files that the documents name."""
    monkeypatch.chdir(tmp_path)
    Path("hole.py").write_text("a = <FILL_ME>\n")
    Path("prompt.txt").write_text("def f(")
    Path("schema.json").write_text('{"type": "array", "maxItems": 2}')
    Path("names.gbnf").write_text('root ::= [a-z]+ "\\n"')
    write_mbpp(Path("mbpp.jsonl"))
    Path("long.py").write_text("def f(x):\n    return x\n" * 20)
    Path("lora-folder").symlink_to(Path(folder).parent / "lora")
    Path(CONVERTED).symlink_to(folder)
    yield tmp_path
    clrt.ops.set_num_threads(len(os.sched_getaffinity(0)))


def on(folder, text):
    """Put a tiny model in the place of those that an example names."""
    for name in MODELS:
        text = text.replace(name, folder)
    return text


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if "```python" in text])
def test_the_python_blocks_run(name, folder, desk, monkeypatch):
    """Those of one document one after another, with the names of the ones before."""
    module = ModuleType("document")  # where @mindspore.jit looks for the names of a function
    monkeypatch.setitem(sys.modules, "document", module)
    text, file = on(folder, DOCUMENTS[name]), str(REPOSITORY / name)
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        above = "\n" * text.count("\n", 0, block.start(1))  # so that sources and errors are found
        exec(compile(above + block[1], file, "exec"), vars(module))


def test_the_readme_fills_in(folder, desk, capsys):
    exec(on(folder, blocks(README, "python")[0]), {})
    filled = capsys.readouterr().out
    assert '\ndef remove_non_ascii(s: str) -> str:\n    """ ' in filled
    assert filled.endswith("\n    return result\n\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run(path, folder, desk, monkeypatch, capsys):
    words = [str(path), folder]
    if "--max-tokens" in path.read_text():
        words += ["--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_examples_say_how_to_run_them():
    assert len(EXAMPLES) >= 5
    for path in EXAMPLES:
        assert re.search(rf"^    python examples/{path.name} \S+$", path.read_text(), re.MULTILINE)


LINES = [
    pytest.param(words, id=f"{document}: {' '.join(words)}") for document, words in shell_lines()
]


@pytest.mark.parametrize("words", LINES)
def test_the_commands_run(words, folder, desk, monkeypatch):
    program, *rest = words
    if program == "codellama-rt":
        command = COMMANDS.get(rest[0], run)
        monkeypatch.setattr(humaneval, "read_problems", lambda: PROBLEMS[:1])
        monkeypatch.setattr(infilling, "read_problems", lambda: PROBLEMS[:1])
        command([on(folder, word) for word in rest])
    elif any(words[: len(start)] == start for start in RUN_BY_CI):
        [start] = [start for start in RUN_BY_CI if words[: len(start)] == start]
        assert shlex.join(start) in (REPOSITORY / ".ci" / "run").read_text()
    else:
        PROGRAMS[program](rest)


def run(words):
    """Run the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.app(words, prog_name="codellama-rt")
    assert ended.value.code == 0


def run_conversion(words):
    """Convert a model that has all the files of a real one."""
    source = make_folder(Path("source"))
    convert(source, Path("meta/CodeLlama-7b"), to="meta")
    q8_model(Path("codellama-7b.Q8_0.gguf"), "mha_theta1e4_fp32")
    Path(CONVERTED).unlink()
    model = words[1] if Path(words[1]).exists() and "/model" not in words[1] else str(source)
    run([words[0], model, *words[2:]])


def run_evaluation(words):
    """Evaluate on problems, files and samples that are small."""
    smaller = {"200": "4", "100": "4", "10": "2", "64": "1", "24000": "700", "24100": "800"}
    smaller |= {"8000": "500", "16000": "600", "16400": "800", "512": "8", "128": "8"}
    Path("source.py").write_text("".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(40)))
    words = [smaller.get(word, word) for word in words]
    if words[1] == "needle":
        words += ["--source", "source.py"]
    elif words[1] in ("humaneval", "mbpp"):
        words += ["--max-new-tokens", "8"]
    run(words)


def run_benchmark(words):
    """Measure at tiny sizes; compare two files of such rows."""
    if words[1] == "serve":  # tests/serve has a server
        run([*words, "--help"])
        return
    fewer = ["--quick", "--op", "silu_and_mul"]
    if words[1] == "compare":
        for name in words[2:]:
            run(["bench", "ops", *fewer, "--tokens", "1", "--json", name])
        run(words)
        return
    run([*words, *(fewer if words[1] == "ops" else fewer[:1])])


def check_installation(words):
    """What pip installs are extras of this package."""
    extras = (REPOSITORY / "pyproject.toml").read_text()
    assert words[0] == "install"
    for names in re.findall(r"\[(.*?)\]", " ".join(words)):
        for name in names.split(","):
            assert re.search(rf"^{name} = \[", extras, re.MULTILINE)


def check_python(words):
    """The script takes these options, and the paths of tests are there."""
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if not word.startswith("-")]
        assert all((REPOSITORY / path).exists() for path in paths)
        return
    script, *options = words
    command = [sys.executable, str(REPOSITORY / script), "--help"]
    here = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=here).stdout
    for option in options:
        assert not option.startswith("--") or option in said, option


def check_build(words):
    """The build has the options that are given."""
    files = [REPOSITORY / "CMakeLists.txt", *(REPOSITORY / "csrc").rglob("*.cmake")]
    text = "".join(file.read_text() for file in files)
    for name in re.findall(r"-D(\w+)=", " ".join(words)):
        assert name in text or name in ("pybind11_DIR", "codellama_rt_DIR"), name


def check_script(words):
    """The shell can read it."""
    subprocess.run(["bash", "-n", str(REPOSITORY / words[0])], check=True)


def run_server(words):
    """Open the model, read the options, and stop where the server would listen."""
    server = pytest.importorskip("codellama_rt.serve.server")
    with pytest.MonkeyPatch.context() as patch:
        listen = server.listen
        patch.setattr(server, "listen", lambda host, port: listen(host, 0))
        patch.setattr(server, "serve", lambda model, settings, listener, **options: None)
        run(words)


def check_request(words):
    """The server has the path that is asked for."""
    routes = pytest.importorskip("codellama_rt.serve.app").ROUTES
    [url] = [word for word in words if word.startswith("http://")]
    assert any("/" + url.split("/", 3)[3] in paths for _, paths, _ in routes)


COMMANDS = {
    "convert": run_conversion,
    "eval": run_evaluation,
    "bench": run_benchmark,
    "serve": run_server,
}
PROGRAMS = {
    "curl": check_request,
    "pip": check_installation,
    "python": check_python,
    "cmake": check_build,
    "OUT=results": check_script,
}
RUN_BY_CI = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["python", "tools/generate_docs.py"],
    ["python", "-m", "build"],
    ["auditwheel", "repair", "--wheel-dir"],
]


def test_the_arguments_of_llm_are_all_described():
    table = DOCUMENTS["docs/api.md"].partition("takes these keyword arguments:")[2]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table.partition("\n`model`")[0], re.MULTILINE)
    parameters = dict(inspect.signature(clrt.LLM).parameters)
    del parameters["model"]
    assert {name: eval(default) for name, default in rows} == {
        name: parameter.default for name, parameter in parameters.items()
    }


def test_the_table_of_models_is_that_of_the_variants():
    rows = re.findall(
        r"^\| (\d+B[^|]*) \| ([\d,]+) \| (1e\d) \| ([\d,]+) \| ([\d,]+) \| (.*?)\|$",
        DOCUMENTS["docs/api.md"],
        re.MULTILINE,
    )
    found = {}
    for names, *numbers, abilities in rows:
        kind = names.split()[-1] if names.split()[-1].isalpha() else ""
        vocab_size, theta, trained, longest = (float(n.replace(",", "")) for n in numbers)
        can = tuple(word.strip() == "yes" for word in abilities.split("|"))
        for size in re.findall(r"(\d+)B", names):
            name = f"CodeLlama-{size}b" + (f"-{kind}" if kind else "")
            found[name] = (vocab_size, theta, trained, longest, *can)
    assert found == {
        name: (
            variant.config.vocab_size, variant.config.rope_theta,
            variant.config.max_position_embeddings, variant.longest, variant.can_infill,
            variant.can_chat,
        )
        for name, variant in clrt.VARIANTS.items()
    }  # fmt: skip


def test_the_commands_of_chat_are_described():
    from codellama_rt.cli.chat_session import ChatSession

    session = ChatSession(None, clrt.SamplingParams())
    document = DOCUMENTS["docs/cli.md"]
    rows = document[document.index("| command | |") :].split("\n\n")[0].splitlines()
    described = {name for row in rows for name in re.findall(r"`(/[\w?]+)", row.split(" | ")[0])}
    heads = re.findall(r"^(/[\w?]+)(?:, (/[\w?]+))?", session.command("/help"), re.MULTILINE)
    assert described == {name for names in heads for name in names if name}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_every_block_says_what_it_is(name):
    """So that none is left out of the tests above by accident."""
    fences = re.findall(r"^ *```(\w*)$", DOCUMENTS[name], re.MULTILINE)
    languages = {"python", "sh", "text"}
    if name.startswith("docs/clients/"):  # tests/serve/test_clients.py reads these
        languages |= {"json", "toml", "yaml"}
    assert set(fences[::2]) <= languages
    assert set(fences[1::2]) <= {""}


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def test_the_first_two_lines_of_shell_install():
    """CI takes them from here."""
    lines = "".join(blocks(README, "sh")).splitlines()
    assert lines[0].startswith("pip install . && codellama-rt generate ")
    assert re.fullmatch(r'pip install -e "\.\[test\]" && .*pytest.*', lines[1])


@pytest.fixture(scope="module")
def generator():
    return runpy.run_path(str(REPOSITORY / "tools" / "generate_docs.py"))


def test_the_op_tables_are_those_of_the_schema(generator):
    for name, make in generator["DOCUMENTS"].items():
        text = (REPOSITORY / name).read_text()
        assert generator["replaced"](text, make()) == text, "run tools/generate_docs.py"


def test_the_op_tables_hold_every_op(generator):
    for name in ("docs/operators.md", "csrc/README.md"):  # a device's own has those of its kernels
        table = generator["DOCUMENTS"][name]()
        assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == list(OPS)


def test_a_document_without_markers_is_refused(generator):
    with pytest.raises(ValueError, match="markers"):
        generator["replaced"]("no table", "")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = REPOSITORY / name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", DOCUMENTS[name]):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_files_that_are_named_exist(name):
    text = re.sub(r"^```.*?^```$", "", DOCUMENTS[name], flags=re.MULTILINE | re.DOTALL)
    folders = "tests|benchmarks|tools|csrc|examples|docs|codellama_rt"
    for file in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.(?:py|cc|h|sh|md|def)\b", text):
        assert (REPOSITORY / file).exists() or "relu" in file, file  # `relu` is yet to be added


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_of_prose_are_short(name):
    text = re.sub(r"^```.*?^```$", "", DOCUMENTS[name], flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if not line.lstrip().startswith("|") and not line.startswith("    "):
            assert len(line) <= 100, line
