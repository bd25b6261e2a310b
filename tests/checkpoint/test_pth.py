""".pth files: what they hold is a view of the file, and nothing in them is ever run."""

import contextlib
import io
import pickle
import re
import resource
import sys
import zipfile

import numpy as np
import pytest
from helpers.hostile_pth import ARCHIVES, GOOD, HOSTILE, ORDERED, SHADOWED
from helpers.pth_files import number, numbers, pickled, pth, tensor, text
from helpers.quantized_models import mapping_under

from codellama_rt.checkpoint.formats import pth_pickle as tensor_pickle
from codellama_rt.checkpoint.formats.pth import MAX_DIRECTORY_BYTES, read_pth, verify_pth
from codellama_rt.checkpoint.formats.pth_writer import PthLayout
from codellama_rt.checkpoint.formats.tensor_file import Entry, write_tensor_file
from codellama_rt.errors import CheckpointError, CheckpointWarning
from codellama_rt.ops.dtypes import numpy_dtype

VALUES = np.arange(4, dtype=np.float32)

_watched: list[str] | None = None


def _audit(event, arguments):
    if _watched is not None and event in RUNNING:
        _watched.append(event)


RUNNING = {
    "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "os.remove", "os.rename",
}  # fmt: skip
"".encode("cp437")  # zipfile's codec, which is executed when it is first imported
sys.addaudithook(_audit)


def refused(path):
    """Reads a file that must be refused, and sees to it that nothing was run; returns why."""
    global _watched
    _watched = []
    try:
        with pytest.raises(CheckpointError) as raised:
            read_pth(path)
        assert _watched == []
    finally:
        _watched = None
    return str(raised.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(pth(HOSTILE[name]))
    reason = refused(path)
    assert reason.startswith(f"{path}: ")
    assert len(reason) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(ARCHIVES[name])
    assert refused(path).startswith(f"{path}: expected ")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_there_are_enough_of_them():
    assert len(HOSTILE) + len(ARCHIVES) >= 100


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "stack_global"])
def test_the_payloads_would_run_in_pythons_unpickler(tmp_path, name):
    """So that their refusal proves something."""
    raw = HOSTILE[name].replace(text(SHADOWED), text("1"))
    ran = []

    class Watched(pickle.Unpickler):
        def find_class(self, module, found):
            return lambda argument: ran.append((module, found, argument))

    Watched(io.BytesIO(raw)).load()
    assert [argument for *_, argument in ran] == ["1"]


def test_a_pickle_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("codellama_rt.checkpoint.formats.pth.MAX_PICKLE_BYTES", 100)
    monkeypatch.setattr(tensor_pickle, "MAX_PICKLE_BYTES", 100)
    (tmp_path / "a.pth").write_bytes(pth(GOOD))
    assert "a pickle of 101 bytes; at most 100" in refused(tmp_path / "a.pth")


def test_reasons_say_what_was_found(tmp_path):
    expected = {
        "os.system": "expected a dictionary of tensors, found the name 'os.system'",
        "INST": "INST in the pickle", "a path as key": "a key that is no number",
        "an offset beyond": r"expected elements within its storage of 4, found (2, 2) from 1",
        "a transposed matrix": "expected its elements one after another, found strides (1, 2)",
        "a member that is not there": "expected its bytes in data/7, found no such member",
    }  # fmt: skip
    for name, reason in expected.items():
        (tmp_path / "a.pth").write_bytes(pth(HOSTILE[name]))
        assert reason in refused(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(ARCHIVES["a bomb"])
    assert "expected member 'a/data.pkl' to be stored as it is" in refused(tmp_path / "a.pth")


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    for end in range(len(GOOD)):
        (tmp_path / "a.pth").write_bytes(pth(GOOD[:end]))
        assert refused(tmp_path / "a.pth")


def test_random_bytes_in_a_pickle_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(500):
        raw = bytearray(GOOD)
        for at in rng.integers(len(raw), size=3):
            raw[at] = rng.integers(256)
        with contextlib.suppress(tensor_pickle.RefusedPickleError):
            found = tensor_pickle.read_tensor_pickle(bytes(raw))
            assert all(type(said) is tensor_pickle.TensorDescription for said in found.values())


def test_a_place_in_the_memo_takes_no_memory():
    """Python's unpickler in C would allocate, and fill, 34 GB."""
    raw = pickled(tensor() + b"r\xff\xff\xff\x7f")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert tensor_pickle.read_tensor_pickle(raw).keys() == {"w"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14


def test_a_tensor_is_a_view_of_the_file(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pth(GOOD, VALUES.tobytes()))
    found = read_pth(path)["w"]
    assert np.array_equal(found.view(), VALUES.reshape(2, 2))
    assert mapping_under(found.payload) is not None
    assert not found.payload.flags.writeable


def test_a_part_of_a_storage(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pth(pickled(tensor(numbers(2), numbers(1), number(2))), VALUES.tobytes()))
    assert read_pth(path)["w"].view().tolist() == [2.0, 3.0]


def test_a_state_dict_with_its_notes(tmp_path):
    """As torch.save(model.state_dict()) writes it: an OrderedDict with versions in _metadata."""
    versions = text("") + b"}" + text("version") + b"K\x01s"
    notes = b"}" + text("_metadata") + ORDERED + b")R" + versions + b"ssb"
    raw = b"\x80\x02" + ORDERED + b")R" + text("w") + tensor() + b"s" + notes + b"."
    (tmp_path / "a.pth").write_bytes(pth(raw, VALUES.tobytes()))
    assert read_pth(tmp_path / "a.pth").keys() == {"w"}


def written(path, arrays):
    encodings = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    entries = [
        Entry(
            name,
            encodings[a.dtype.name],
            a.shape,
            a.nbytes,
            lambda a=a: a.reshape(-1).view(np.uint8),
        )
        for name, a in arrays.items()
    ]
    write_tensor_file(path, PthLayout(entries, path.stem), lambda e: None, lambda c: None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_we_write_we_read(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 5), "b": (7,), "c": (2, 3, 4)}
    arrays = {n: rng.standard_normal(s).astype(numpy_dtype(dtype)) for n, s in shapes.items()}
    written(tmp_path / "consolidated.00.pth", arrays)
    found = read_pth(tmp_path / "consolidated.00.pth")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].view().tobytes() == array.tobytes()
        assert found[name].payload.ctypes.data % 64 == 0
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth") as reader:
        assert reader.testzip() is None


def test_archives_in_64_bits(tmp_path, monkeypatch):
    """As of files over 4 GiB, with the limit lowered."""
    arrays = {"a": np.arange(600, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    monkeypatch.setattr("codellama_rt.checkpoint.formats.pth_writer._LARGE", 1000)
    written(tmp_path / "a.pth", arrays)
    found = read_pth(tmp_path / "a.pth")
    assert found["a"].payload.tobytes() == arrays["a"].tobytes()
    assert found["b"].shape == (2, 2)


def test_a_list_of_members_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("codellama_rt.checkpoint.formats.pth.MAX_DIRECTORY_BYTES", 100)
    (tmp_path / "a.pth").write_bytes(pth(GOOD))
    assert re.search(r"found a list of members of 1\d\d bytes", refused(tmp_path / "a.pth"))


def test_random_bytes_in_an_archive_are_read_or_refused(tmp_path):
    rng, good = np.random.default_rng(0), pth(GOOD)
    for _ in range(1000):
        raw = bytearray(good)
        for at in rng.integers(len(raw), size=3):
            raw[at] = rng.integers(256)
        (tmp_path / "a.pth").write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            assert all(
                tensor.payload.nbytes == 16 for tensor in read_pth(tmp_path / "a.pth").values()
            )


# Checksums


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_bit_that_changed_is_found(tmp_path, size):
    path = tmp_path / "a.pth"
    written(path, {"a": np.arange(size, dtype=np.float32), "b": np.ones(size, np.float32)})
    seen = []
    verify_pth(path, seen.append)
    assert sum(seen) > 8 * size
    raw = bytearray(path.read_bytes())
    place = raw.index(np.ones(size, np.float32).tobytes())
    raw[place + 2 * size] ^= 1
    path.write_bytes(raw)
    read_pth(path)  # opening reads no tensor
    with pytest.raises(CheckpointError, match=r"to have the CRC-32 0x\w{8}, found 0x\w{8}"):
        verify_pth(path, seen.append)


def test_archives_without_checksums(tmp_path):
    """torch writes zeros if it is told not to compute them."""
    path = tmp_path / "a.pth"
    written(path, {"a": np.arange(9, dtype=np.float32)})
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as reader:
        entries = reader.infolist()
    place = raw.index(b"PK\x01\x02")
    for entry in entries:
        raw[place + 16 : place + 20] = bytes(4)
        place = raw.find(b"PK\x01\x02", place + 1)
        assert entry.CRC
    path.write_bytes(raw)
    with pytest.warns(CheckpointWarning, match="its bytes are not verified"):
        verify_pth(path, lambda count: None)


def test_pickles_and_lists_of_members_are_small():
    """Interpreted, a pickle of nothing but dictionaries takes 70 times its size."""
    assert tensor_pickle.MAX_PICKLE_BYTES <= 2**21
    assert MAX_DIRECTORY_BYTES <= 2**22
