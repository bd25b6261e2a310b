"""Large products by cuBLASLt: what it is asked, against a library that checks and multiplies."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from device_arrays import get, poisoned, put
from helpers.builders import normal
from helpers.goldens import tiny_golden
from helpers.tolerances import DOT_RTOL, assert_equal_bits

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.model.cuda import ops
from codellama_rt.model.cuda.llama import CUBLASLT_VARIABLE, DeviceLlama
from codellama_rt.model.cuda.tensor import Memory
from codellama_rt.model.cuda.weights import upload

REPOSITORY = Path(__file__).resolve().parents[3]
INCLUDES = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests/emulators/cuda'}"]
WORKSPACE_BYTES = 1 << 20


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """(path, library)."""
    path = tmp_path_factory.mktemp("cublaslt") / "libcublasLt_fake.so"
    source = Path(__file__).with_name("fake_cublaslt.cc")
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DCLRT_EMULATE", *INCLUDES]
    subprocess.run(["c++", *options, str(source), "-o", str(path)], check=True)
    return path, ctypes.CDLL(str(path))


@pytest.fixture
def cublaslt(emulated, fake):
    """Counters of the library, which is in use."""
    path, library = fake
    memory = Memory(WORKSPACE_BYTES)
    assert emulated.use_cublaslt(str(path), memory.pointer, WORKSPACE_BYTES) == ""
    for name in ("fake_choices", "fake_products"):
        ctypes.c_int.in_dll(library, name).value = 0
    most = ctypes.c_uint64.in_dll(library, "fake_most_columns")
    all_of_them = most.value
    yield lambda name: ctypes.c_int.in_dll(library, f"fake_{name}").value, most
    most.value = all_of_them
    emulated.leave_cublaslt()


def multiply(x, weights, rows=slice(None)):
    out = poisoned((len(x[rows]), sum(len(w) for w in weights)), "float32")
    return get(ops.linear(put(x[rows]), tuple(put(w) for w in weights), out=out))


@pytest.fixture
def case(rng):
    x = normal(rng, (50, 128), "bfloat16")
    return x, [normal(rng, (n, 128), "bfloat16") for n in (24, 8)]


def test_many_tokens_go_by_it_and_few_do_not(cublaslt, case):
    counter, _ = cublaslt
    x, weights = case
    out = multiply(x, weights)
    assert (counter("choices"), counter("products")) == (2, 2)
    rows, weight = x.astype(np.float64), np.concatenate(weights).astype(np.float64)
    magnitude = np.abs(rows) @ np.abs(weight).T
    assert (np.abs(out - rows @ weight.T) <= DOT_RTOL * magnitude).all()
    multiply(x, weights, slice(32))
    assert counter("products") == 2


def test_an_algorithm_is_chosen_once_a_weight_whatever_the_number_of_tokens(cublaslt, case):
    counter, _ = cublaslt
    x, weights = case
    whole = multiply(x, weights)
    assert_equal_bits(multiply(x, weights, slice(40)), whole[:40])
    assert (counter("choices"), counter("products")) == (2, 4)


def test_what_it_does_not_take_goes_by_our_own(cublaslt, case, rng):
    counter, most = cublaslt
    x, weights = case
    multiply(x[:, :120].copy(), [w[:, :120].copy() for w in weights])  # no algorithm
    most.value = 40
    multiply(x, weights)  # an algorithm, but not for so many tokens
    multiply(x, [weights[0][:23], weights[1]])  # the second result begins at 92 bytes
    assert counter("products") == 0


def test_without_it_a_row_is_the_same_by_few_and_many(emulated, case):
    x, weights = case
    assert_equal_bits(multiply(x, weights)[:5], multiply(x, weights, slice(5)))


def test_a_library_that_is_none_is_refused(emulated, tmp_path):
    assert "cannot be loaded" in emulated.use_cublaslt(str(tmp_path / "none.so"), 0, 0)
    path = tmp_path / "empty.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-xc++", "/dev/null", "-o", str(path)], check=True)
    assert emulated.use_cublaslt(str(path), 0, 0) == "libcublasLt lacks a function"


def make_model():
    checkpoint = open_checkpoint(tiny_golden("hd128_gqa_bf16").folder, dtype="bfloat16")
    return DeviceLlama(checkpoint.config, upload(checkpoint.weights))


def test_a_model_uses_it_where_the_variable_says_so(emulated, fake, monkeypatch, case):
    path, library = fake
    products = ctypes.c_int.in_dll(library, "fake_products")
    monkeypatch.setenv(CUBLASLT_VARIABLE, str(path))
    model = make_model()
    products.value = 0
    multiply(*case)
    assert products.value == 2
    monkeypatch.setenv(CUBLASLT_VARIABLE, "/nowhere/libcublasLt.so")
    with pytest.raises(RuntimeError, match=r"CODELLAMA_RT_CUBLASLT=/nowhere.*cannot be loaded"):
        make_model()
    monkeypatch.delenv(CUBLASLT_VARIABLE)
    model = make_model()
    multiply(*case)
    assert products.value == 2
    del model
