"""Files that torch.save never writes: what would run code, lie about shapes, or eat memory."""

import io
import struct
import tarfile
import zipfile

from helpers.pth_files import (
    archive,
    call,
    name_of,
    number,
    numbers,
    pickled,
    pth,
    storage,
    tensor,
    text,
)

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
    "tuples in tuples as a name": b"\x80\x02})" + b"\x85" * 1_000_000 + tensor() + b"s.",
    "a bomb of tuples as a name": b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 200
    + tensor() + b"s.",
    "bytes longer than the file": pickled(b"B" + struct.pack("<I", 2**31 - 1)),
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
