"""The C functions: what the header says is in the library, with the bits of direct calls."""

import ctypes
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.arguments import OP_NAMES, call, make_arguments
from helpers.builders import int32
from helpers.tolerances import assert_equal_bits

import codellama_rt
from codellama_rt import ops
from codellama_rt.ops.dtypes import FLOATS
from codellama_rt.ops.quantized import CACHE_DTYPES, WEIGHT_DTYPES, Quantized, weight_num_bytes
from codellama_rt.ops.schema import OPS

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "embed_cpp"
HEADER = Path(codellama_rt.get_include()) / "codellama_rt.h"
LIBRARY = Path(codellama_rt.__file__).with_name("libcodellama_rt_cpu.so")
INVALID_VALUE, INVALID_DTYPE = 1, 2

library = ctypes.CDLL(str(LIBRARY))
library.codellama_rt_last_error.restype = ctypes.c_char_p
library.codellama_rt_isa.restype = ctypes.c_char_p
library.codellama_rt_weight_bytes.argtypes = [ctypes.c_char_p, *2 * [ctypes.c_int64]]
library.codellama_rt_cache_bytes.argtypes = [ctypes.c_char_p, ctypes.c_int32, *4 * [ctypes.c_int64]]
for sizes in (library.codellama_rt_weight_bytes, library.codellama_rt_cache_bytes):
    sizes.restype = ctypes.c_int64


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_char_p),
        ("ndim", ctypes.c_int32),
        ("read_only", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, array, *, strided=True):
        if isinstance(array, Quantized):
            tensor = cls.of(array.payload, strided=False)
            tensor.dtype = array.dtype.encode()
        else:
            tensor = cls(array.ctypes.data, array.dtype.name.encode())
            if strided:
                tensor.strides[: array.ndim] = [s // array.itemsize for s in array.strides]
        tensor.ndim = len(array.shape)
        tensor.shape[: tensor.ndim] = array.shape
        return tensor


TYPES = {"size_t": ctypes.c_size_t, "int32_t": ctypes.c_int32, "float": ctypes.c_float,
         "codellama_rt_tensor": Tensor}  # fmt: skip


def structs_of_header():
    """The arguments of each operator, read from the header."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structs = {}
    for body, name in re.findall(r"typedef struct \{([^}]*)\} codellama_rt_(\w+)_args;", text):
        fields = []
        for kind, names in re.findall(r"(\w+) ([^;]+);", body):
            for field, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
                fields.append((field, TYPES[kind] * int(count) if count else TYPES[kind]))
        structs[name] = type(f"{name}_args", (ctypes.Structure,), {"_fields_": fields})
    return structs


STRUCTS = structs_of_header()


def run(name, arguments, **attributes):
    """Call an operator; its result. Arguments are arrays by the header's names."""
    args = STRUCTS[name](struct_size=ctypes.sizeof(STRUCTS[name]), **attributes)
    for argument, array in arguments.items():
        setattr(args, argument, array if isinstance(array, Tensor) else Tensor.of(array))
    return getattr(library, f"codellama_rt_{name}")(ctypes.byref(args))


def last_error():
    return library.codellama_rt_last_error().decode()


def test_every_operator_has_its_function_and_struct():
    listed = set(
        re.findall(r"^CLRT_\w*OP\((\w+),", (REPOSITORY / "csrc/ops.def").read_text(), re.M)
    )
    assert set(STRUCTS) == listed == {*OPS, "quantize", "repack", "sample", "token_logprobs"}
    for name in listed:
        assert hasattr(library, f"codellama_rt_{name}")


def arguments_in_c(op, arrays):
    """The arrays by the names of the header, and the attributes."""
    attributes = {name: attribute.default for name, attribute in op.attributes.items()}
    if op.name != "linear":
        return arrays, attributes
    arrays = dict(arrays)
    weights = (Tensor * 3)(Tensor.of(arrays.pop("weight")))
    return arrays, {"weights": weights, "num_weights": 1}


@pytest.mark.parametrize("name", OP_NAMES)
def test_the_bits_of_direct_calls(name):
    op, arrays = OPS[name], make_arguments(OPS[name])
    expected = {argument: array.copy() for argument, array in arrays.items()}
    call(op, expected)
    in_c, attributes = arguments_in_c(op, arrays)
    assert run(name, in_c, **attributes) == 0, last_error()
    for argument, array in arrays.items():
        assert_equal_bits(array, expected[argument])


def test_quantised_tensors(rng):
    weight, x = rng.standard_normal((33, 64), np.float32), rng.standard_normal((2, 64), np.float32)
    for dtype in ("int8", "int4"):
        num_bytes = library.codellama_rt_weight_bytes(dtype.encode(), 33, 64)
        payload = Quantized(np.zeros(num_bytes, np.uint8), dtype, weight.shape)
        assert run("quantize", {"weight": weight, "payload": payload}) == 0, last_error()
        expected = ops.quantize(weight, dtype)
        assert_equal_bits(payload.payload, expected.payload)
        weights, out = (Tensor * 3)(Tensor.of(payload)), np.zeros((2, 33), np.float32)
        assert run("linear", {"x": x, "out": out}, weights=weights, num_weights=1) == 0
        assert_equal_bits(out, ops.linear(x, expected))


def test_blocks_of_gguf_are_repacked(rng):
    rows = Quantized(rng.integers(0, 250, 33 * 2 * 18).astype(np.uint8), "q4_0", (33, 64))
    num_bytes = library.codellama_rt_weight_bytes(b"q4_0_tiled", 33, 64)
    tiles = Quantized(np.zeros(num_bytes, np.uint8), "q4_0_tiled", (33, 64))
    assert run("repack", {"weight": rows, "tiles": tiles}) == 0, last_error()
    assert_equal_bits(tiles.payload, ops.repack(rows).payload)


def test_tokens_are_chosen_and_ranked(rng):
    logits, samples = rng.standard_normal((3, 77), np.float32), 5
    each = {
        "temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    rows = int32([0, 1, 2, 1, 1])
    no_lists = np.zeros(samples + 1, np.int32)
    token_ids = np.full(samples, -1, np.int32)
    arguments = {
        "logits": logits,
        "rows": rows,
        **{name: np.full(samples, value) for name, value in each.items()},
        "top_k": np.full(samples, 20, np.int32),
        **{name: np.arange(samples, dtype=np.uint64) for name in ("seed", "index", "position")},
        **{f"{name}_offsets": no_lists for name in ("seen", "bias")},
        **{f"{name}_ids": int32([]) for name in ("seen", "bias")},
        "seen_counts": int32([]),
        "bias_values": np.empty(0),
        "masks": np.empty((0, 3), np.uint32),
        "mask_rows": np.full(samples, -1, np.int32),
        "token_ids": token_ids,
        "has_token": np.zeros(samples, np.bool_),
    }
    assert run("sample", arguments) == 0, last_error()
    keys = {name: arguments[name] for name in ("top_k", "seed", "index", "position")}
    assert_equal_bits(token_ids, ops.sample(logits, rows=rows, **each, **keys).token_ids)
    found = [np.zeros((5, 3)), np.zeros(5, np.int32), np.zeros((5, 2), np.int32)]
    outputs = dict(zip(("logprobs", "ranks", "top_ids"), found, strict=True))
    inputs = {"logits": logits, "rows": rows, "token_ids": token_ids}
    assert run("token_logprobs", inputs | outputs) == 0, last_error()
    for mine, theirs in zip(
        found, ops.token_logprobs(logits, token_ids, 2, rows=rows), strict=True
    ):
        assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_views_of_a_quantised_cache(dtype, rng):
    shape, slots = (3, 2, 32, 64), int32([40, 5, -1, 95])
    rows = rng.standard_normal((2, 4, 2, 64), np.float32)
    expected = ops.empty_caches(dtype, shape)
    ops.reshape_and_cache(*rows, *expected, slots)
    pieces = [cache.payload.shape[2] for cache in expected]
    pool = np.zeros((3, 2, sum(pieces)), np.uint8)
    views = pool[..., : pieces[0]], pool[..., pieces[0] :]
    caches = []
    for view in views:
        caches.append(Tensor.of(Quantized(view, dtype, shape)))
        caches[-1].strides[:2] = view.strides[:2]
    given = dict(zip(("key_cache", "value_cache"), caches, strict=True))
    arguments = {"key": rows[0], "value": rows[1], **given, "slot_mapping": slots}
    assert run("reshape_and_cache", arguments) == 0, last_error()
    for view, cache in zip(views, expected, strict=True):
        assert_equal_bits(np.ascontiguousarray(view), cache.payload)
    caches[0].strides[2] = 1
    assert run("reshape_and_cache", arguments | {"key_cache": caches[0]}) == INVALID_VALUE
    assert "strides of blocks and of heads alone" in last_error()


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_bytes_of_weights(dtype):
    expected = weight_num_bytes(dtype, (48, 512))
    assert library.codellama_rt_weight_bytes(dtype.encode(), 48, 512) == expected
    assert library.codellama_rt_weight_bytes(dtype.encode(), -1, 512) == -1
    assert library.codellama_rt_weight_bytes(dtype.encode(), 1 << 40, 1 << 40) == -1


@pytest.mark.parametrize("dtype", [*FLOATS, *CACHE_DTYPES])
def test_bytes_of_caches(dtype):
    shape = (5, 2, 32, 64)
    for key, cache in zip((1, 0), ops.empty_caches(dtype, shape), strict=True):
        assert library.codellama_rt_cache_bytes(dtype.encode(), key, *shape) == cache.nbytes
    for bad in ((5, 2, 17, 64), (-1, 2, 32, 64), (1 << 40, 1 << 20, 32, 64)):
        assert library.codellama_rt_cache_bytes(dtype.encode(), 1, *bad) == -1
    assert library.codellama_rt_cache_bytes(b"int5", 1, *shape) == -1


# ---- errors --------------------------------------------------------------------------------------


def rms_norm_arguments():
    return {"x": np.ones((2, 4), np.float32), "weight": np.ones(4, np.float32),
            "out": np.zeros((2, 4), np.float32)}  # fmt: skip


def test_errors_are_results_and_text():
    arguments = rms_norm_arguments()
    assert run("rms_norm", arguments | {"x": np.ones((2, 4))}, eps=1e-5) == INVALID_DTYPE
    assert last_error().startswith("rms_norm: x must be float32, float16 or bfloat16")
    assert run("rms_norm", arguments, eps=-1.0) == INVALID_VALUE
    assert last_error() == "rms_norm: eps must be finite and not negative"
    assert run("rms_norm", arguments, num_threads=-1) == INVALID_VALUE
    assert last_error() == "num_threads must not be negative, got -1"
    read_only = Tensor.of(arguments["out"])
    read_only.read_only = 1
    assert run("rms_norm", arguments | {"out": read_only}) == INVALID_VALUE
    assert "must not be read-only" in last_error()
    nowhere = Tensor.of(arguments["x"])
    nowhere.data = None
    assert run("rms_norm", arguments | {"x": nowhere}) == INVALID_VALUE
    assert last_error() == "a tensor's data is null"
    deep = Tensor.of(arguments["x"])
    deep.ndim = 5
    assert run("rms_norm", arguments | {"x": deep}) == INVALID_VALUE
    assert "at most 4 dimensions, got 5" in last_error()
    assert not arguments["out"].any()


def test_the_text_of_an_error_is_its_threads_own():
    assert run("rms_norm", rms_norm_arguments(), eps=-1.0) == INVALID_VALUE
    ours, theirs = last_error(), []
    thread = threading.Thread(target=lambda: theirs.append(last_error()))
    thread.start()
    thread.join()
    assert (theirs, last_error()) == ([""], ours)


def test_the_size_of_a_struct():
    size = ctypes.sizeof(STRUCTS["rms_norm"])
    for wrong in (0, 8, size + 8):
        assert run_with_size("rms_norm", wrong) == INVALID_VALUE
        assert "struct_size must be sizeof the struct" in last_error()
    assert library.codellama_rt_rms_norm(None) == INVALID_VALUE
    assert run_with_size("rms_norm", size) == 0


def run_with_size(name, size):
    args = STRUCTS[name](struct_size=size)
    for argument, array in rms_norm_arguments().items():
        setattr(args, argument, Tensor.of(array))
    return getattr(library, f"codellama_rt_{name}")(ctypes.byref(args))


def test_what_an_older_struct_lacks_is_zero():
    """A program that ends before `out` gives none: told, not read past its struct's end."""
    offset = STRUCTS["rms_norm"].out.offset
    assert run_with_size("rms_norm", offset) == INVALID_VALUE
    assert last_error() == "a tensor's data is null"


def test_threads_and_instruction_sets(threads, isa):
    threads(3)
    assert library.codellama_rt_num_threads() == 3
    assert library.codellama_rt_set_num_threads(2) == 0
    assert ops.num_threads() == 2
    assert library.codellama_rt_set_num_threads(0) == INVALID_VALUE
    assert library.codellama_rt_isa().decode() == isa
    assert library.codellama_rt_set_isa(isa.encode()) == 0
    assert library.codellama_rt_set_isa(b"avx1024") == INVALID_VALUE
    assert "instruction set 'avx1024' is not available" in last_error()
    assert library.codellama_rt_api_version() == int(
        re.search(r"CODELLAMA_RT_API_VERSION (\d+)", HEADER.read_text())[1]
    )


# ---- programs ------------------------------------------------------------------------------------


def compiler(variable, *names):
    chosen = os.environ.get(variable, "").split()[:1]
    for name in (*chosen, *names):
        if shutil.which(name):
            return name
    pytest.skip(f"no compiler found: {', '.join(names)}")


def test_the_header_is_c99(tmp_path):
    source = tmp_path / "program.c"
    source.write_text("#include <codellama_rt.h>\nint main(void) { return 0; }\n")
    command = [compiler("CC", "cc", "gcc", "clang"), "-std=c99", "-pedantic", "-Wall", "-Wextra",
               "-Werror", f"-I{HEADER.parent}", source, "-o", tmp_path / "program"]  # fmt: skip
    subprocess.run(command, check=True)


def check_example(program):
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest difference" in result.stdout
    assert "paged_attention: seq_lens must be int32 (num_seqs=1)" in result.stdout
    loaded = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libcodellama_rt_cpu.so" in loaded
    assert "python" not in loaded.replace(str(LIBRARY), "")


def test_the_example_with_a_compiler_alone(tmp_path):
    program = tmp_path / "embed"
    command = [compiler("CXX", "c++", "g++", "clang++"), "-std=c++17", "-Wall", "-Wextra",
               "-Werror", f"-I{HEADER.parent}", EXAMPLE / "main.cc", LIBRARY,
               f"-Wl,-rpath,{LIBRARY.parent}", "-o", program]  # fmt: skip
    subprocess.run(command, check=True)
    check_example(program)


def test_the_example_with_the_cmake_package(tmp_path):
    compiler("CXX", "c++", "g++", "clang++")
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("no cmake and ninja on the path")
    configure = ["cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", tmp_path,
                 f"-Dcodellama_rt_DIR={codellama_rt.get_cmake_dir()}"]  # fmt: skip
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    check_example(tmp_path / "embed")


def test_a_package_that_is_not_built_is_told_by_cmake(tmp_path):
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("no cmake and ninja on the path")
    compiler("CXX", "c++", "g++", "clang++")
    package = shutil.copytree(codellama_rt.get_cmake_dir(), tmp_path / "package" / "cmake")
    configure = ["cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", tmp_path / "build",
                 f"-Dcodellama_rt_DIR={package}"]  # fmt: skip
    result = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the package was not built" in " ".join(result.stderr.split())
