""".pth files: what they hold is a view of the file, and nothing in them is ever run."""

import contextlib
import io
import pickle
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from pth_files import archive, call, name_of, number, numbers, pickled, pth, storage, tensor, text
from quantized_models import mapping_under

from codellama_rt.checkpoint import tensor_pickle
from codellama_rt.checkpoint.pth_file import read_pth
from codellama_rt.checkpoint.pth_writer import PthLayout
from codellama_rt.checkpoint.tensor_file import Entry, write_tensor_file
from codellama_rt.dtypes import numpy_dtype
from codellama_rt.errors import CheckpointError

VALUES = np.arange(4, dtype=np.float32)
ORDERED = name_of("collections", "OrderedDict")
SHADOWED = "touch canary"


CALLS = {
    f"{module}.{name}": call(module, name, SHADOWED)
    for module, name in [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"),
        ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "eval"),
        ("builtins", "exec"), ("__builtin__", "eval"), ("builtins", "__import__"),
        ("builtins", "getattr"), ("builtins", "open"), ("importlib", "import_module"),
        ("runpy", "run_path"), ("pickle", "loads"), ("torch", "load"), ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor"), ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.fromkeys"), ("torch", "LongStorage"), ("", ""),
    ]
}  # fmt: skip
STACK_GLOBALS = {
    "stack_global": text("os") + text("system") + b"\x93(" + text(SHADOWED) + b"tR",
    "stack_global of attributes": (
        text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93"
    ),
    "stack_global of a longer module": text("collections.abc") + text("OrderedDict") + b"\x93",
    "stack_global through the memo": (
        text("os") + b"\x94" + text("system") + b"h\x00\x8c\x06system\x93"
    ),
    "stack_global of numbers": number(1) + number(2) + b"\x93",
    "stack_global of names": ORDERED + ORDERED + b"\x93",
}  # fmt: skip
CALLING_OPCODES = {
    "INST": b"(" + text(SHADOWED) + b"ios\nsystem\n",
    "OBJ": b"(" + name_of("os", "system") + text(SHADOWED) + b"o",
    "INST of a known name": b"(icollections\nOrderedDict\n",
    "OBJ of a known name": b"(" + ORDERED + b"o",
    "NEWOBJ": ORDERED + b")\x81",
    "NEWOBJ_EX": ORDERED + b")}\x92",
    "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\x00", "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n", "APPEND": b"]" + text("a") + b"a",
    "BUILD of a state": (
        ORDERED + b")R}" + text("__class__") + name_of("torch", "HalfStorage") + b"sb"
    ),
    "BUILD of a tensor": tensor() + b"}b",
    "BUILD of a name": ORDERED + b"}b",
    "REDUCE of a text": text("os.system") + b"(" + text(SHADOWED) + b"tR",
    "REDUCE of a storage class": name_of("torch", "FloatStorage") + b"(" + number(2**40) + b"tR",
    "REDUCE of OrderedDict with items": ORDERED + b"((" + text("a") + number(1) + b"tttR",
    "REDUCE without a tuple": ORDERED + b"}R",
}  # fmt: skip
PERSISTENT_IDS = {
    "another kind of id": storage(word="module"),
    "an id that is text": text("storage") + b"Q",
    "an id cut short": b"(" + text("storage") + b"tQ",
    "a storage of OrderedDict": storage(kind=ORDERED),
    "a storage of text": storage(kind=text("os.system")),
    "a path as key": storage("../../etc/passwd"),
    "an absolute path as key": storage("/etc/passwd"),
    "digits of another script": storage("\u0661"),
    "a negative storage": storage(size=-4),
    "a storage of 2**60": storage(size=2**60),
}
SHAPES = {
    "negative axes": tensor(numbers(-2, -2)),
    "an axis of 2**60": tensor(numbers(2**60, 2)),
    "axes whose product overflows": tensor(numbers(2**32, 2**32), numbers(2**32, 1)),
    "no elements": tensor(numbers(0, 4), numbers(4, 1)),
    "more than the storage": tensor(numbers(2, 3), numbers(3, 1)),
    "nine axes": tensor(numbers(*[1] * 9), numbers(*[1] * 9)),
    "strides of nothing": tensor(numbers(2**40, 2), numbers(0, 1)),
    "strides beyond": tensor(strides=numbers(2**40, 1)),
    "negative strides": tensor(strides=numbers(-2, 1)),
    "a transposed matrix": tensor(strides=numbers(1, 2)),
    "too few strides": tensor(strides=numbers(1)),
    "an offset beyond": tensor(offset=number(1)),
    "a negative offset": tensor(offset=number(-1)),
    "an offset of text": tensor(offset=text("0")),
    "a shape of texts": tensor(b"(" + text("2") + text("2") + b"t"),
    "a shape that is a dictionary": tensor(b"}"),
    "truth as an axis": tensor(b"\x88\x85", numbers(1)),
    "a storage that is none": tensor(stored=number(0)),
    "a member that is not there": tensor(stored=storage("7")),
    "a storage of another size": tensor(numbers(2, 1), numbers(1, 1), stored=storage(size=2)),
}
STRUCTURES = {
    "a list": b"\x80\x02].", "a text": b"\x80\x02" + text("a") + b".",
    "a text as tensor": pickled(text("a")), "a dictionary of dictionaries": pickled(b"}"),
    "a number as name": b"\x80\x02}" + number(1) + tensor() + b"s.",
    "a name twice": b"\x80\x02}" + (text("w") + tensor() + b"s") * 2 + b".",
    "a dictionary of itself": b"\x80\x02}q\x00" + text("w") + b"h\x00s.",
    "no end": b"\x80\x02}", "nothing": b"", "a stop alone": b".", "a memo that is empty": b"h\x00.",
    "a tuple without a mark": b"t.", "protocol 200": b"\x80\xc8}.", "an integer of 255 bytes":
    pickled(b"\x8a\xff" + bytes(255)), "LONG4": pickled(b"\x8b" + struct.pack("<I", 2**31 - 1)),
    "a text longer than the file": pickled(b"X" + struct.pack("<I", 2**32 - 1)),
    "text that is not UTF-8": pickled(b"X\x01\x00\x00\x00\xff"),
    "a name without an end": b"cos" * 99,
    "a bomb of tuples": pickled(b")q\x00" + b"h\x00h\x00\x86q\x00" * 200),
    "marks alone": b"(" * 10_000 + b"t" * 10_001,
    "tuples in tuples": pickled(b")" + b"\x85" * 100_000),
    "a float": pickled(b"G" + struct.pack(">d", 1.0)),
}  # fmt: skip
PICKLES = STACK_GLOBALS | CALLING_OPCODES | PERSISTENT_IDS | SHAPES
HOSTILE = CALLS | STRUCTURES | {name: pickled(value) for name, value in PICKLES.items()}
GOOD = pickled(tensor())


def patched(raw: bytes, signature: bytes, at: int, value: bytes, which: int = 0) -> bytes:
    """The archive with bytes of a header replaced."""
    begin = -1
    for _ in range(which + 1):
        begin = raw.index(signature, begin + 1)
    return raw[: begin + at] + value + raw[begin + at + len(value) :]


def tar_of(raw):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as writer:
        member = tarfile.TarInfo("storages")
        member.size = len(raw)
        writer.addfile(member, io.BytesIO(raw))
    return file.getvalue()


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
ARCHIVES = {
    "compressed": archive({"a/data.pkl": GOOD, "a/data/0": bytes(16)}, zipfile.ZIP_DEFLATED),
    "a bomb": archive({"a/data.pkl": GOOD, "a/data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED),
    "encrypted": patched(pth(GOOD), CENTRAL, 8, b"\x01"),
    "a name that climbs": pth(GOOD, **{"../../evil": b"x"}),
    "an absolute name": pth(GOOD, **{"/etc/cron.d/evil": b"x"}),
    "a name of another system": pth(GOOD, **{"a\\..\\evil": b"x"}),
    "a drive": pth(GOOD, **{"c:evil": b"x"}),
    "a control character": pth(GOOD, **{"a/\x1b[2J": b"x"}),
    "no pickle": archive({"a/data/0": bytes(16)}),
    "two pickles": pth(GOOD, **{"b/data.pkl": CALLS["os.system"]}),
    "a member twice": pth(GOOD, **{"a/data/1": b"x"}).replace(b"a/data/1", b"a/data/0"),
    "an archive inside": archive({"a/b/data.pkl": GOOD, "a/data.zip": pth(GOOD)}),
    "a pickle without folder": archive({"data.pkl": GOOD, "data/0": bytes(16)}),
    "big-endian": pth(GOOD, **{"a/byteorder": b"big"}),
    "cut short": pth(GOOD)[:-30], "an end alone": END + bytes(17), "empty": END + bytes(18),
    "the format before": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + GOOD,
    "a plain pickle": CALLS["os.system"], "tar": tar_of(CALLS["os.system"]), "no file": b"x",
    "a size beyond the file": patched(pth(GOOD), CENTRAL, 20, struct.pack("<LL", 2**31, 2**31), 1),
    "two sizes": patched(pth(GOOD), CENTRAL, 20, struct.pack("<L", 2**20), 1),
    "a place beyond the file": patched(pth(GOOD), CENTRAL, 42, struct.pack("<L", 2**31), 1),
    "members on one another": patched(pth(GOOD), CENTRAL, 42, struct.pack("<L", 0), 1),
    "another name in its place": patched(pth(GOOD), LOCAL, 30, b"b", 1),
    "more members than there are": patched(pth(GOOD), END, 10, b"\x09\x00"),
    "a list beyond the file": patched(pth(GOOD), END, 16, struct.pack("<L", 2**31)),
    "64 bits without a record": patched(pth(GOOD), END, 16, b"\xff" * 4),
    "a size in 64 bits that is missing": patched(pth(GOOD), CENTRAL, 20, b"\xff" * 8, 1),
}  # fmt: skip

_watched: list[str] | None = None


def _audit(event, arguments):
    if _watched is not None and event in RUNNING:
        _watched.append(event)


RUNNING = {
    "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "os.remove", "os.rename",
}  # fmt: skip
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
    monkeypatch.setattr("codellama_rt.checkpoint.pth_file.MAX_PICKLE_BYTES", 100)
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
    monkeypatch.setattr("codellama_rt.checkpoint.pth_writer._LARGE", 1000)
    monkeypatch.setattr("codellama_rt.checkpoint.stored_zip._IN_64_BITS", 1000)
    written(tmp_path / "a.pth", arrays)
    found = read_pth(tmp_path / "a.pth")
    assert found["a"].payload.tobytes() == arrays["a"].tobytes()
    assert found["b"].shape == (2, 2)
