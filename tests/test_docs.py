"""The documents: their commands and examples run, their tables and links are current."""

import inspect
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import typer
from helpers.checkpoint_files import MINI_CONFIG, write_mini
from helpers.quantized_models import q8_model
from helpers.tiny_llm import make_folder
from helpers.tokenizer_files import model_file, sentencepiece_model
from sentencepiece import sentencepiece_model_pb2 as pb

import codellama_rt as clrt
from codellama_rt.checkpoint.weight_loading import expected_shapes
from codellama_rt.cli import main as cli
from codellama_rt.model.config import ModelConfig
from codellama_rt.tools.convert.convert import convert

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
NAMED_MODELS = ("CodeLlama-7b-hf", "CodeLlama-7b-Instruct-hf", "smollm2-135m-instruct")
CONVERTED = "CodeLlama-7b-int4"


def blocks(language):
    """The fenced blocks of a language in the README."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


USE, CHAT, TRANSFORMERS, API = blocks("python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of as many ids as its tokenizer has pieces: any id it draws can be decoded."""
    pieces = pb.ModelProto.FromString(sentencepiece_model()).pieces
    config = {"vocab_size": len(pieces), "max_position_embeddings": 1024, "head_dim": 32}
    shapes = expected_shapes(ModelConfig.from_hf(MINI_CONFIG | config))
    rng = np.random.default_rng(5)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    path = write_mini(tmp_path_factory.mktemp("docs") / "model", tensors, **config)
    model_file(path)
    return str(path)


def on(folder, text):
    """An example on a tiny model instead of those it names."""
    for name in NAMED_MODELS:
        text = text.replace(name, folder)
    return text


def test_the_examples_run(folder, capsys):
    names = {}
    exec(on(folder, USE), names)
    filled = capsys.readouterr().out
    assert filled.startswith('def remove_non_ascii(s: str) -> str:\n    """ ')
    assert filled.endswith("\n    return result\n\n")
    exec(on(folder, CHAT), names)
    assert capsys.readouterr().out.strip()
    exec(on(folder, TRANSFORMERS), names)
    assert "<FILL_ME>" not in capsys.readouterr().out


def test_the_api_page_names_what_there_is():
    compile(API, "README.md", "exec")
    options = re.search(r"clrt\.LLM\(model, (.*?)\)", API, re.DOTALL)[1]
    given = {name: eval(value) for name, value in re.findall(r"(\w+)=([^,\s]+)", options)}
    parameters = inspect.signature(clrt.LLM).parameters
    assert given == {name: parameters[name].default for name in given}
    for dotted in re.findall(r"clrt((?:\.\w+)+)", API):
        found = clrt
        for name in dotted.split(".")[1:]:
            found = getattr(found, name, None) or import_module(f"{found.__name__}.{name}")
    for kind, owner in (("llm", clrt.LLM), ("engine", clrt.Engine)):
        for name in re.findall(rf"\b{kind}\.(\w+)\(", API):
            assert hasattr(owner, name), f"{kind}.{name}"


def command_lines():
    """What the README types after `codellama-rt`, without its comments."""
    text = "\n".join(blocks("sh"))
    lines = re.findall(r"codellama-rt (generate|infill|chat|convert|estimate|doctor)(.*)", text)
    return [[command, *shlex.split(rest, comments=True)] for command, rest in lines]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_the_command_lines_run(words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hole.py").write_text("a = <FILL_ME>\n")
    if words[0] == "convert":
        folder = str(make_folder(tmp_path / "source"))
        convert(folder, tmp_path / "meta" / "CodeLlama-7b", to="meta")
        q8_model(tmp_path / "codellama-7b.Q8_0.gguf", "mha_theta1e4_fp32")
    else:
        (tmp_path / CONVERTED).symlink_to(folder)
    with pytest.raises(SystemExit) as ended:
        cli.app([on(folder, word) for word in words])
    assert ended.value.code == 0


def evaluations():
    """What the README types after `codellama-rt eval`, in blocks and in its table."""
    lines = re.findall(r"\b(?:codellama-rt )?eval (\w+ [^`\n]*--[^`\n]*)", README)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", evaluations(), ids=" ".join)
def test_the_evaluations_are_commands(words):
    """They take long, so they are only parsed."""
    task, *args = words
    command = typer.main.get_command(cli.app).commands["eval"].commands[task]
    command.make_context(task, args)


def test_the_table_of_models_is_that_of_the_variants():
    rows = re.findall(r"^\| (\d+B[^|]*) \| ([\d,]+) \| (1e\d) \| ([\d,]+) \| ([\d,]+) \| (.*?)\|$",
                      README, re.MULTILINE)  # fmt: skip
    found = {}
    for names, *numbers, abilities in rows:
        kind = names.split()[-1] if names.split()[-1].isalpha() else ""
        vocab_size, theta, trained, longest = (float(n.replace(",", "")) for n in numbers)
        can = tuple(word.strip() == "yes" for word in abilities.split("|"))
        for size in re.findall(r"(\d+)B", names):
            name = f"CodeLlama-{size}b" + (f"-{kind}" if kind else "")
            found[name] = (vocab_size, theta, trained, longest, *can)
    assert found == {
        name: (v.config.vocab_size, v.config.rope_theta, v.config.max_position_embeddings,
               v.longest, v.can_infill, v.can_chat)
        for name, v in clrt.VARIANTS.items()
    }  # fmt: skip


def test_the_commands_of_chat_are_in_the_readme():
    from codellama_rt.cli.chat_session import ChatSession

    session = ChatSession(None, clrt.SamplingParams())
    assert set(re.findall(r"^(/\w+)", session.command("/help"), re.MULTILINE)) == set(
        re.findall(r"`(/\w+)", README[README.index("| command | |") :].split("\n\n")[0])
    )


def test_the_first_two_lines_of_shell_install():
    """CI takes them from here."""
    lines = "".join(blocks("sh")).splitlines()
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
    for name in ("README.md", "csrc/README.md"):  # a device's own has those of its kernels
        table = generator["DOCUMENTS"][name]()
        assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == list(clrt.ops.schema.OPS)


def test_a_document_without_markers_is_refused(generator):
    with pytest.raises(ValueError, match="markers"):
        generator["replaced"]("no table", "")


@pytest.mark.parametrize("document", ["README.md", "csrc/README.md"])
def test_links_lead_somewhere(document):
    path = REPOSITORY / document
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\b(?:tests|benchmarks|tools|csrc)/[\w/]+\.\w+", README):
        assert (REPOSITORY / name).exists(), name
