"""Compiles the Triton twin for Ascend 910B2 as far as Huawei's compiler goes without CANN.

    pip install --no-deps triton-ascend==3.2.0 ascendnpu-ir==1.2.0
    pip install pybind11 "numpy<2"
    python compile.py

In an environment of its own (x86-64, Python 3.11, 215 MB to fetch; no torch). Triton lowers a
kernel to MLIR; bishengir-compile divides it into cube and vector code, plans L1 and the unified
buffer and inserts synchronisation; then it calls hivmc, which only CANN has. That this call is what
fails is the success here: a kernel whose tiles do not fit is refused before, after a try without
double buffers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ascendnpuir
import flash_decode
import triton
from triton.backends.ascend.compiler import AscendBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = "Ascend910B2"
LAST_STEP = "hivmc"
BIN = Path(ascendnpuir.__file__).parent / "bin"
POINTERS = {"query": "*fp16", "key_cache": "*fp16", "value_cache": "*fp16", "block_tables": "*i32",
            "seq_lens": "*i32", "out": "*fp16"}  # fmt: skip
NUMBERS = {"max_blocks": "i32", "num_splits": "i32", "scale": "fp32"}
SIZES = {"HEAD_DIM": 128, "SPLIT": 1024}


def lower(kernel: triton.JITFunction, sizes: dict[str, int]) -> str:
    """MLIR of a kernel, as bishengir-compile takes it."""
    from triton._C.libtriton import ir

    types = POINTERS | NUMBERS
    names = [name for name in kernel.arg_names if name not in sizes]
    signature = {name: types.get(name, "*fp32") for name in names}
    backend = AscendBackend(GPUTarget("npu", TARGET, 0))
    options = backend.parse_options({})
    source = ASTSource(fn=kernel, signature=signature, constants=sizes)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(),
                            backend.get_module_map(), context)  # fmt: skip
    metadata = {**options.__dict__, "target": backend.target}
    stages = {}
    backend.add_stages(stages, options)
    for stage in ("ttir", "ttadapter"):
        module = stages[stage](module, metadata)
    return module


def compile_for_npu(mlir: str) -> str:
    """Everything that bishengir-compile says, the IR after it planned the memory included."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ttadapter.mlir")
        source.write_text(mlir)
        result = subprocess.run(
            [BIN / "bishengir-compile", source, f"--target={TARGET}", "-o", f"{folder}/kernel.o",
             "--enable-auto-multi-buffer=true", "--enable-hfusion-compile=true",
             "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true",
             "--mlir-print-ir-after=hivm-plan-memory"],
            capture_output=True, text=True,
            env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
    return result.stdout + result.stderr


def reached_last_step(said: str) -> bool:
    """Whether nothing was missing but the closed step."""
    return f"External {LAST_STEP} run fails, returning module" in said


def kernels(block_size: int) -> Iterator[tuple[str, triton.JITFunction, dict[str, int]]]:
    """Those of Code Llama 7B (no groups) and 34B (groups of 8)."""
    for heads, group in (("32/32", 1), ("64/8", 8)):
        sizes = {"GROUP": group, "BLOCK_SIZE": block_size, **SIZES}
        yield f"attend, {heads} heads", flash_decode.attend, sizes
    yield "merge", flash_decode.merge, SIZES


def main() -> None:
    """Compile every kernel; exit with 1 if one is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block-size", type=int, default=128, help="tokens a page (a tile)")
    args = parser.parse_args()
    failed = False
    for name, kernel, sizes in kernels(args.block_size):
        said = compile_for_npu(lower(kernel, sizes))
        if reached_last_step(said):
            found = sorted(set(re.findall(r"hivm\.hir\.(\w+)", said)))
            print(f"{name}: compiled up to {LAST_STEP}; {', '.join(found)}")
        else:
            failed = True
            print(f"{name}: refused\n{said[-2000:]}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
