"""Instruction sets, threads and devices: chosen by call or by environment, refused by name."""

import contextlib
import ctypes
import math
import os
import platform
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from helpers.builders import normal, paged, running_on
from helpers.tolerances import assert_equal_bits

from codellama_rt import ops
from codellama_rt.ops import native

ALL_FEATURES = ["avx2", "avx512", "avx512_vnni", "avx512_bf16"]


def python(code, **environment):
    """Runs code in a new interpreter; returns its exit status and output."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return result.returncode, result.stdout.strip() + result.stderr.strip()


def cpu_vendor():
    """CPUID's name of this CPU's maker, as Linux tells it; Arm's has none."""
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if "vendor_id" in line), "")


def test_available_sets_come_best_first_and_end_with_the_baseline():
    names = ops.available_isas()
    best_first = native._core.isas_of(cpu_vendor(), ALL_FEATURES)
    assert names == [name for name in best_first if name in names]
    assert names[-1] == "baseline"


@pytest.mark.parametrize(
    ("vendor", "features", "sets"),
    [
        ("AuthenticAMD", ALL_FEATURES, "avx512_bf16 avx512_vnni avx512 avx2"),
        ("GenuineIntel", ALL_FEATURES, "avx512_vnni avx512_bf16 avx512 avx2"),
        ("CentaurHauls", ALL_FEATURES, "avx512_vnni avx512_bf16 avx512 avx2"),
        ("GenuineIntel", ["avx2", "avx512", "avx512_vnni"], "avx512_vnni avx512 avx2"),
        ("AuthenticAMD", ["avx2", "avx512", "avx512_vnni"], "avx512_vnni avx512 avx2"),
        ("GenuineIntel", ["avx2", "avx512"], "avx512 avx2"),
        ("GenuineIntel", ["avx2", "avx512", "avx512_bf16"], "avx512 avx2"),
        ("GenuineIntel", ["avx2", "avx512_vnni"], "avx2"),
        ("AuthenticAMD", ["avx2"], "avx2"),
        ("AuthenticAMD", ["avx512"], ""),
        ("", [], ""),
    ],
)
def test_the_maker_of_the_cpu_decides_between_pairs_of_bfloat16_and_float32(vendor, features, sets):
    """VDPBF16PS is twice as fast as float32 FMA on AMD, and half as fast on Intel."""
    assert native._core.isas_of(vendor, features) == [*sets.split(), "baseline"]


def test_the_chosen_set_is_in_use(isa):
    assert ops.isa() == isa
    assert isa in ops.available("cpu")[1]


def test_unknown_set_is_refused_and_changes_nothing():
    before = ops.isa()
    with pytest.raises(ValueError, match=r"'avx1024' is not available; available:.* baseline"):
        ops.set_isa("avx1024")
    assert ops.isa() == before


@pytest.mark.parametrize("name", ops.available_isas())
def test_environment_chooses_the_set(name):
    code = "from codellama_rt import ops; print(ops.isa())"
    assert python(code, CODELLAMA_RT_ISA=name) == (0, name)


def test_best_set_without_environment():
    code = "from codellama_rt import ops; print(ops.isa())"
    assert python(code, CODELLAMA_RT_ISA="") == (0, ops.available_isas()[0])


def test_environment_with_an_unknown_set():
    status, output = python("import codellama_rt.ops", CODELLAMA_RT_ISA="sse9")
    assert status != 0
    assert "ValueError: CODELLAMA_RT_ISA=sse9: instruction set 'sse9' is not available" in output


def threads_with(own, omp):
    """What a new interpreter prints of its number of threads, or its last line of error."""
    code = "from codellama_rt import ops; print(ops.num_threads())"
    environment = {"CODELLAMA_RT_NUM_THREADS": own, "OMP_NUM_THREADS": omp}
    return python(code, **environment)[1].splitlines()[-1]


USUAL = str(min(len(os.sched_getaffinity(0)), math.ceil(min(native._core.cpu_quota(), 2**20))))


@pytest.mark.parametrize(
    ("own", "omp", "used"),
    [
        ("3", "", "3"),
        ("1", "", "1"),
        ("007", "", "7"),
        ("", "", USUAL),
        ("", "5", "5"),
        ("", "4,2", "4"),
        ("", " 6 , 3 ", "6"),
        ("3", "5", "3"),
        ("", "0", USUAL),
        ("", "-2", USUAL),
        ("", "many", USUAL),
        ("", "4,", USUAL),
        ("", "4,x", USUAL),
        ("", "9" * 30, USUAL),
    ],
)
def test_environment_chooses_the_threads(own, omp, used):
    """OpenMP's variable is a default; what OpenMP ignores is ignored."""
    assert threads_with(own, omp) == used


@pytest.mark.parametrize("value", ["0", "-2", "many", "2.5", " 3", "4,2", "9" * 30, "0x4"])
def test_a_bad_number_of_threads_in_the_environment_is_refused(value):
    assert threads_with(value, "2") == (
        f"ValueError: CODELLAMA_RT_NUM_THREADS={value}: expected a whole number of threads, "
        "at least 1"
    )


def test_what_a_framework_puts_into_the_process_environment_is_not_the_users_wish():
    """MindSpore sets OMP_NUM_THREADS=1 where it is imported; Python's environment has it not."""
    code = (
        "import ctypes; ctypes.CDLL(None).setenv(b'OMP_NUM_THREADS', b'77', 1); "
        "from codellama_rt import ops; print(ops.num_threads())"
    )
    environment = {"OMP_NUM_THREADS": "", "CODELLAMA_RT_NUM_THREADS": ""}
    assert python(code, **environment) == (0, USUAL)


def test_a_bad_folder_of_ascend_libraries_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"CODELLAMA_RT_ASCEND_LIBRARIES=.*none: expected a fold"):
        ops.available("ascend")


@pytest.mark.parametrize(
    ("count", "bound"), [(0, "least 1"), (-1, "least 1"), (2**31, "most"), (-(2**40), "least 1")]
)
def test_no_threads_are_refused(count, bound):
    with pytest.raises(ValueError, match=f"num_threads must be at {bound}.*, got {count}"):
        ops.set_num_threads(count)


def test_number_of_threads_is_an_int():
    with pytest.raises(TypeError):
        ops.set_num_threads(1.5)


@pytest.mark.parametrize("device", ["cuda", "ascend"])
def test_devices_that_this_build_has_not(device):
    usable, reason = ops.available(device)
    assert not usable
    assert device in reason
    assert "available: cpu" in reason


def test_unknown_device():
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'ascend', got 'tpu'"):
        ops.available("tpu")


def test_python_threads_call_at_the_same_time(rng, threads):
    """Callers that find the pool busy work alone; nobody's numbers get mixed up."""
    threads(2)
    x, weight = normal(rng, (20, 300)), normal(rng, (500, 300), "bfloat16")
    case = paged(rng, [900, 300], [1, 40])
    expected = ops.linear(x, weight), ops.paged_attention(*case.arguments)[0]
    wrong = []

    def work():
        for _ in range(20):
            got = ops.linear(x, weight), ops.paged_attention(*case.arguments)[0]
            wrong.extend(
                1 for a, b in zip(got, expected, strict=True) if a.tobytes() != b.tobytes()
            )

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORK = """
import os, numpy as np
from codellama_rt import ops
ops.set_num_threads(2)
x = np.ones((20, 300), np.float32)
expected = ops.linear(x, x)  # starts the pool
child = os.fork()
if child == 0:
    os._exit(0 if ops.linear(x, x).tobytes() == expected.tobytes() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_starts_its_own_threads():
    assert python(FORK) == (0, "0")


def test_changing_the_threads_between_calls(rng, threads):
    x, weight = normal(rng, (20, 300)), normal(rng, (500, 300))
    expected = ops.linear(x, weight)
    for count in (1, 2, 3, 2, 8, 1):
        threads(count)
        assert ops.num_threads() == count
        assert_equal_bits(ops.linear(x, weight), expected)


def test_regions_end_without_the_threads_that_come_late(rng, threads):
    """More threads than CPUs, woken from sleep, under limits of all kinds: every task is done."""
    x, weight = normal(rng, (3, 64)), normal(rng, (9000, 64))
    expected, wrong = ops.linear(x, weight), []

    def work(seed):
        choose = np.random.default_rng(seed)
        for _ in range(300):
            limit = int(choose.integers(1, 20))
            wrong.append(ops.linear(x, weight, num_threads=limit).tobytes() != expected.tobytes())
            if limit == 1:
                sum(range(10_000))  # long enough for the others to go to sleep

    threads(16)
    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == [False] * 900


def test_sets_agree_where_nothing_is_rounded(rng):
    x, identity = normal(rng, (4, 64)), np.eye(64, dtype=np.float32)
    for name in ops.available_isas():
        with running_on(isa=name):
            assert_equal_bits(ops.linear(x, identity), x)


@pytest.mark.parametrize(
    ("has_driver", "words"),
    [
        (False, "no NVIDIA driver found; install the driver of your GPU; available: cpu"),
        (True, "version is insufficient; install a newer NVIDIA driver; available: cpu"),
    ],
)
def test_a_missing_driver_is_not_called_an_old_one(monkeypatch, has_driver, words):
    built = types.SimpleNamespace(
        unavailable_reason=lambda: "no CUDA device: CUDA driver version is insufficient"
    )
    monkeypatch.setattr(native.importlib, "import_module", lambda name: built)
    monkeypatch.setattr(native, "has_nvidia_driver", lambda: has_driver)
    usable, reason = ops.available("cuda")
    assert not usable
    assert words in reason


@pytest.mark.parametrize(
    ("has_driver", "reason"),
    [(False, "this build has no cuda kernels, and no NVIDIA driver was found; to use a GPU install "
      "its driver, then install this package with CODELLAMA_RT_CUDA=ON; available: cpu"),
     (True, "this build has no cuda kernels, only the NVIDIA driver is there; install this package "
      "with CODELLAMA_RT_CUDA=ON; available: cpu")],
)  # fmt: skip
def test_what_is_there_and_what_to_install(monkeypatch, has_driver, reason):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(native.importlib, "import_module", absent)
    monkeypatch.setattr(native, "has_nvidia_driver", lambda: has_driver)
    assert ops.available("cuda") == (False, reason)
    with pytest.raises(RuntimeError, match="install this package with CODELLAMA_RT_CUDA=ON"):
        native.cuda()


def test_a_device_that_is_hidden_is_told(monkeypatch):
    built = types.SimpleNamespace(unavailable_reason=lambda: "no CUDA device: none is visible")
    monkeypatch.setattr(native.importlib, "import_module", lambda name: built)
    monkeypatch.setattr(native, "has_nvidia_driver", lambda: True)
    assert "none is visible; name it in CUDA_VISIBLE_DEVICES" in ops.available("cuda")[1]


def test_the_driver_is_looked_for_by_its_library(monkeypatch):
    monkeypatch.setattr(native, "_DRIVER", "libc.so.6")
    assert native.has_nvidia_driver()
    monkeypatch.setattr(native, "_DRIVER", "lib-of-no-driver.so.1")
    assert not native.has_nvidia_driver()


@contextlib.contextmanager
def flushing_subnormals():
    """Set flush-to-zero and subnormals-are-zero in this thread, as frameworks do in theirs."""
    libm = ctypes.CDLL("libm.so.6")
    kept, changed = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    libm.fegetenv(kept)
    libm.fegetenv(changed)
    mxcsr = ctypes.c_uint32.from_buffer(changed, 28)  # glibc's fenv_t on x86-64
    mxcsr.value |= 0x8040
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(kept)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets a register of x86-64")
def test_the_callers_floating_point_mode_changes_no_bit(rng):
    """Neither that of the calling thread, nor that of the thread which started the workers."""
    x = normal(rng, (5, 256))
    weight = np.full((4096, 256), 2.0**-24, np.float16)  # the smallest subnormal
    for name in ops.available_isas():
        with running_on(isa=name, num_threads=3):
            expected = ops.linear(x, weight)
        assert np.any(expected)
        with running_on(isa=name, num_threads=2):
            with flushing_subnormals():
                ops.set_num_threads(4)  # the next call starts a pool of that many
                assert_equal_bits(ops.linear(x, weight), expected)
            assert_equal_bits(ops.linear(x, weight), expected)
