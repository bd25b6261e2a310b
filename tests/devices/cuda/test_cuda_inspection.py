"""The library as nvcc made it: loads anywhere, no kernel spills, the instructions meant."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import codellama_rt
from codellama_rt import ops
from codellama_rt.ops.schema import OPS

LIBRARY = Path(codellama_rt.__file__).parent / "libcodellama_rt_cuda.so"
REPOSITORY = Path(__file__).resolve().parents[3]
built = pytest.mark.skipif(not LIBRARY.is_file(), reason="this build has no cuda kernels")


def load_tool():
    spec = importlib.util.spec_from_file_location(
        "inspect_cuda", REPOSITORY / "tools" / "inspect_cuda.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["inspect_cuda"] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@built
def test_it_loads_without_a_gpu_and_says_so():
    code = (
        "import importlib\n"
        "from codellama_rt import ops\n"
        "usable, text = ops.available('cuda')\n"
        "assert usable or text.startswith('cuda kernels are built, but '), text\n"
        "module = importlib.import_module('codellama_rt._cuda')\n"
        "if not usable:\n"
        "    try:\n"
        "        module.allocate(16)\n"
        "        raise SystemExit('memory where there is no device')\n"
        "    except RuntimeError as error:\n"
        "        assert str(error).startswith('cuda: cudaMalloc: '), error\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@built
def test_every_op_has_its_symbols():
    library = ctypes.CDLL(str(LIBRARY))
    names = [n for n in OPS if n != "decoder_layer"]  # that one is for MindSpore's CPU graphs
    for name in names:
        for symbol in (f"clrt_{name}", f"clrt_{name}Init", f"clrt_{name}InferShape"):
            assert hasattr(library, symbol), symbol


@built
def test_it_needs_no_cuda_library_to_load():
    needed = subprocess.run(
        ["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    assert not [line for line in needed.splitlines() if "NEEDED" in line and "cuda" in line]


@built
def test_no_kernel_spills():
    report = LIBRARY.with_name("cuda_ptxas.txt").read_text()
    assert tool.counted(report) > 100
    assert tool.spills(report) == []


@built
@pytest.mark.skipif(tool.cuobjdump() is None, reason="no cuobjdump: the extra [cuda-build] has it")
def test_the_instructions_that_were_meant_are_there():
    assert tool.faults(tool.disassemble(LIBRARY, tool.cuobjdump())) == []


REPORT = """ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""


def test_a_spill_is_found():
    assert tool.counted(REPORT) == 2
    (found,) = tool.spills(REPORT)
    assert found.startswith("sm_90a _Z6secondv: 24 bytes stack frame")


def test_a_missing_instruction_is_found():
    kernels = [
        tool.Kernel(f"_Z19{label.replace(' ', '')}", architecture, size=1000)
        for label, architecture in tool.MEANT
    ]
    assert len(tool.faults(kernels)) >= len(tool.MEANT) - 4
    assert "sm_90a has no attend_wgmma_kernel" in tool.faults([])


def test_a_kernel_that_does_nothing_must_trap():
    names = "attend_split_kernel", "attend_wgmma_kernel", "image_kernel"
    kernels = [tool.Kernel(f"_Z{len(name)}{name}v", "sm_80", size=16) for name in names]
    silent = [fault for fault in tool.faults(kernels) if "does nothing" in fault]
    assert len(silent) == 2
    for kernel in kernels:
        kernel.instructions[tool.TRAP] = 1
    assert not [fault for fault in tool.faults(kernels) if "does nothing" in fault]


def test_the_device_is_refused_where_it_is_not():
    usable, reason = ops.available("cuda")
    if usable:
        pytest.skip(f"a GPU is here: {reason}")
    assert reason.endswith("; available: cpu")
