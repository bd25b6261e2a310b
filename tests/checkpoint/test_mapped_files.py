"""Files that are written or cut while their weights are in use: noticed, and nothing else is."""

import gc
import os
import shutil

import pytest
from helpers.adapter_files import write_adapter
from helpers.checkpoint_files import TINY, mini_gguf_bytes, write_mini

from codellama_rt.checkpoint import adapter as adapter_module
from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.adapter import load_adapter
from codellama_rt.checkpoint.mapped_files import MappedFile, MappedFiles
from codellama_rt.errors import CheckpointChangedError, CheckpointError
from codellama_rt.tools.convert.convert import convert

NAME = "gqa_theta1e6_bf16"


def rewrite(path):
    """Overwrite some bytes in place; the time is set, as a clock may not have ticked since."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"other")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 4_000_000))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    path.write_bytes(b"")


def extend(path):
    with open(path, "ab") as file:
        file.write(b"more")


def copy_over(path):
    """As cp does: the file is cut to nothing and written again."""
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 4_000_000))


def cut_under_another_name(path):
    os.rename(path, path.with_name("old"))
    path.write_bytes(b"new")
    cut(path.with_name("old"))


def cut_under_another_link(path):
    os.link(path, path.with_name("link"))
    path.unlink()
    cut(path.with_name("link"))


CHANGES = {
    rewrite: r"modified at .*, found ",
    cut: r"5000 bytes, found 4999",
    empty: r"5000 bytes, found 0",
    extend: r"5000 bytes, found 5004",
    copy_over: r"modified at .*, found ",
    cut_under_another_name: r"5000 bytes, found 4999",
    cut_under_another_link: r"5000 bytes, found 4999",
}


def replace(path):
    path.with_name("new").write_bytes(b"new")
    os.replace(path.with_name("new"), path)


HARMLESS = {
    "replacing it": replace,
    "removing it": os.unlink,
    "renaming it": lambda path: path.rename(path.with_name("old")),
    "linking it": lambda path: os.link(path, path.with_name("link")),
    "protecting it": lambda path: path.chmod(0o400),
    "reading it": lambda path: path.read_bytes(),
    "opening it to write": lambda path: open(path, "r+b").close(),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 5000)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_explained(path, change):
    mapping = MappedFile(path)
    files = MappedFiles([mapping])
    files.check()
    change(path)
    reason = f"^{path}: expected the file as it was when it was mapped, {CHANGES[change]}.*; open"
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match=reason):
            files.check()


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_the_mapping_intact_is_no_change(path, name):
    mapping = MappedFile(path)
    HARMLESS[name](path)
    MappedFiles([mapping]).check()
    assert mapping[:] == b"a" * 5000


def test_the_error_is_of_the_checkpoint_and_of_no_argument():
    assert issubclass(CheckpointChangedError, CheckpointError)
    assert issubclass(CheckpointChangedError, RuntimeError)


def test_a_descriptor_that_other_code_closed_is_not_taken_for_the_file(path):
    mapping = MappedFile(path)
    kept = os.dup(mapping._descriptor)
    os.close(mapping._descriptor)
    with pytest.raises(CheckpointChangedError, match="closed by other code"):
        mapping.check()
    other = os.open(__file__, os.O_RDONLY)
    os.dup2(other, mapping._descriptor)
    with pytest.raises(CheckpointChangedError, match="used for another file"):
        mapping.check()
    os.dup2(kept, mapping._descriptor)
    mapping.check()
    os.close(kept)
    if other != mapping._descriptor:
        os.close(other)


def test_a_relative_path_is_reported_in_full(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    mapping = MappedFile(path.relative_to(path.parent))
    cut(path)
    monkeypatch.chdir("/")
    with pytest.raises(CheckpointChangedError, match=f"^{path}: "):
        mapping.check()


def test_a_file_is_dropped_with_its_mapping(path):
    gc.collect()  # of what other tests have left
    descriptors = os.listdir("/proc/self/fd")
    mapping = MappedFile(path)
    files = MappedFiles([mapping, mapping])
    cut(path)
    del mapping
    gc.collect()
    files.check()
    assert os.listdir("/proc/self/fd") == descriptors


def gguf(folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(mini_gguf_bytes())
    return folder / "model.gguf"


FORMATS = {
    "safetensors": write_mini,
    "shards": lambda folder: shutil.copytree(TINY / "mqa_fp16_sharded", folder),
    "gguf": gguf,
    "int4": lambda folder: convert(TINY / NAME, folder, quantization="int4"),
    "pth": lambda folder: convert(TINY / NAME, folder, to="meta"),
}


@pytest.mark.parametrize("change", [rewrite, extend])
@pytest.mark.parametrize("name", FORMATS)
def test_every_file_of_every_format_is_looked_at(tmp_path, name, change):
    FORMATS[name](tmp_path / "m")
    kinds = (".safetensors", ".pth", ".gguf")
    files = [file.name for file in (tmp_path / "m").iterdir() if file.suffix in kinds]
    assert len(files) == (6 if name == "shards" else 1)
    for file in files:
        checkpoint = open_checkpoint(FORMATS[name](tmp_path / f"for {file}"))
        checkpoint.files.check()
        change(tmp_path / f"for {file}" / file)
        with pytest.raises(CheckpointChangedError, match=f"/for {file}/{file}: "):
            checkpoint.files.check()


def test_files_whose_weights_are_copies_are_not_looked_at(tmp_path):
    """Converted, quantised, or joined from shards."""
    write_mini(tmp_path / "a")
    convert(TINY / NAME, tmp_path / "b", to="meta", shards=2)
    checkpoints = [
        open_checkpoint(tmp_path / "a", dtype="bfloat16"),
        open_checkpoint(tmp_path / "a", dtype="float16", quantization="int8"),
        open_checkpoint(tmp_path / "b"),
    ]
    gc.collect()
    for file in (tmp_path / "a" / "model.safetensors", *(tmp_path / "b").glob("*.pth")):
        cut(file)
    for checkpoint in checkpoints:
        checkpoint.files.check()


def test_a_hub_snapshot_of_links_to_blobs(tmp_path):
    """The blob is looked at; the link may come to point to a newer one."""
    snapshot = write_mini(tmp_path / "snapshot")
    file, blobs = snapshot / "model.safetensors", tmp_path / "blobs"
    blobs.mkdir()
    os.rename(file, blobs / "old")
    shutil.copy(blobs / "old", blobs / "new")
    file.symlink_to(blobs / "old")
    checkpoint = open_checkpoint(snapshot)
    file.unlink()
    file.symlink_to(blobs / "new")
    checkpoint.files.check()
    rewrite(blobs / "new")
    checkpoint.files.check()
    rewrite(blobs / "old")
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors: "):
        checkpoint.files.check()


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"},
                                     {"check": "finite"}], ids=str)  # fmt: skip
def test_a_file_that_is_written_while_it_is_loaded(tmp_path, options):
    file = write_mini(tmp_path / "m") / "model.safetensors"
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "m", **options, progress=lambda *_: extend(file))


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_source_that_is_written_while_it_is_converted(tmp_path, at):
    file = write_mini(tmp_path / "m") / "model.safetensors"

    def progress(done, total, what):
        if done >= at * total:
            extend(file)

    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors"):
        convert(tmp_path / "m", tmp_path / "out", quantization="int8", progress=progress)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_an_adapter_that_is_written_while_it_is_loaded(tmp_path, monkeypatch):
    config = open_checkpoint(TINY / NAME).config
    folder = write_adapter(tmp_path / "a", config)
    file = folder / "adapter_model.safetensors"
    loaded = load_adapter(folder, config)
    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "require_finite", lambda *_: rewrite(file))
        with pytest.raises(CheckpointChangedError, match=r"adapter_model\.safetensors"):
            load_adapter(folder, config)
    before = loaded.layers[0]["q_proj"].up.copy()
    empty(file)  # what is loaded is a copy
    assert (loaded.layers[0]["q_proj"].up == before).all()
