"""Inspect nvcc's code of the CUDA kernels: no spills, and the intended instructions.

    python tools/inspect_cuda.py            # one table; fails where something is missing
    python tools/inspect_cuda.py --library codellama_rt/libcodellama_rt_cuda.so

Spills are read from the compiler's report (cuda_ptxas.txt beside the library), instructions from
the disassembly, for which `cuobjdump` must be on the path or installed by the extra [cuda-build].
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = REPOSITORY / "codellama_rt" / "libcodellama_rt_cuda.so"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "UBLKCP", "USETMAXREG", "LDGSTS", "LDSM", "LDL", "STL")
# (kernel, architecture) -> instructions that its machine code must contain
MEANT = {
    ("attend_split_kernel float", "sm_90a"): ("HMMA", "UTMALDG", "LDSM"),
    ("attend_split_kernel quantized", "sm_90a"): ("HMMA", "UBLKCP"),
    ("attend_split_kernel float", "sm_80"): ("HMMA", "LDGSTS", "LDSM"),
    ("attend_split_kernel quantized", "sm_80"): ("HMMA", "LDGSTS"),
    ("attend_unsplit_kernel float", "sm_90a"): ("HMMA", "UTMALDG", "LDSM"),
    ("attend_unsplit_kernel quantized", "sm_90a"): ("HMMA", "UBLKCP"),
    ("attend_unsplit_kernel float", "sm_80"): ("HMMA", "LDGSTS", "LDSM"),
    ("attend_unsplit_kernel quantized", "sm_80"): ("HMMA", "LDGSTS"),
    ("attend_wgmma_kernel", "sm_90a"): ("HGMMA", "UTMALDG", "USETMAXREG"),
    ("linear_kernel", "sm_90a"): ("HMMA",),
    ("linear_kernel", "sm_80"): ("HMMA",),
    ("linear_many_kernel", "sm_90a"): ("HMMA", "LDGSTS"),
    ("linear_many_kernel", "sm_80"): ("HMMA", "LDGSTS"),
}
LOCAL = ("LDL", "STL")  # local memory: used by spills and arrays indexed at run time
# Attention's kernels with this few instructions are for the other architecture: they must trap.
EMPTY, TRAP = 32, "BPT"
_CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


@dataclass
class Kernel:
    """One function of one architecture's machine code."""

    name: str
    architecture: str
    size: int = 0
    instructions: Counter = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """Its name without template arguments; for attention, by the kind of cache."""
        found = re.search(r"\d+((?:attend|linear|[a-z_]+)[a-z_]*_kernel)", self.name)
        label = found[1] if found else self.name
        if label in ("attend_split_kernel", "attend_unsplit_kernel"):
            label += " quantized" if "QuantizedTile" in self.name else " float"
        return label


def cuobjdump() -> str | None:
    """Return the disassembler, or None."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(wheels))


def spills(report: str) -> list[str]:
    """Return the kernels with spills or a stack, as reported by ptxas."""
    found, name, architecture = [], "", ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture = match.groups()
        elif re.search(r"\d+ bytes stack frame", line) and not line.strip().startswith(_CLEAN):
            found.append(f"{architecture} {name}: {line.strip()}")
    return found


def counted(report: str) -> int:
    """Return the number of kernels in the report."""
    return len(re.findall(r"Compiling entry function", report))


def disassemble(library: Path, tool: str) -> list[Kernel]:
    """Return every kernel of the library, with the instructions of interest counted."""
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    text = subprocess.run(
        [tool, "--dump-sass", str(library)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    kernels, architecture = [], ""
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)")
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernels.append(Kernel(match[1], architecture))
        elif kernels and (match := pattern.match(line)):
            kernels[-1].size += 1
            kernels[-1].instructions[match[1]] += 1
    return kernels


def faults(kernels: list[Kernel]) -> list[str]:
    """Return everything that is not as intended."""
    found = []
    for (label, architecture), wanted in MEANT.items():
        some = [k for k in kernels if (k.label, k.architecture) == (label, architecture)]
        full = [kernel for kernel in some if kernel.size > EMPTY]
        if not full:
            found.append(f"{architecture} has no {label}")
        for kernel in full:
            missing = [name for name in wanted if not kernel.instructions[name]]
            if missing:
                found.append(f"{architecture} {kernel.name} has no {', '.join(missing)}")
    for kernel in kernels:
        empty = kernel.label.startswith("attend_") and kernel.size <= EMPTY
        if empty and not kernel.instructions[TRAP]:
            found.append(f"{kernel.architecture} {kernel.name} does nothing, and does not say so")
        if any(kernel.instructions[name] for name in LOCAL):
            found.append(f"{kernel.architecture} {kernel.name} uses local memory")
    return found


def table(kernels: list[Kernel]) -> str:
    """Return one row per kernel and architecture: how often each instruction occurs."""
    lines = ["| kernel | code for | variants | " + " | ".join(INSTRUCTIONS) + " |"]
    lines.append("| --- " * (3 + len(INSTRUCTIONS)) + "|")
    for label, architecture in sorted({(k.label, k.architecture) for k in kernels}):
        some = [
            k
            for k in kernels
            if (k.label, k.architecture) == (label, architecture) and k.size > EMPTY
        ]
        counts = [sum(k.instructions[name] for k in some) for name in INSTRUCTIONS]
        cells = " | ".join(str(count or "") for count in counts)
        lines.append(f"| {label} | {architecture} | {len(some)} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit with what is wrong, if anything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    args = parser.parse_args()
    report = args.library.with_name("cuda_ptxas.txt")
    if not args.library.is_file() or not report.is_file():
        sys.exit(f"no {args.library.name} with its report in {args.library.parent}: build it first")
    wrong = spills(report.read_text())
    print(f"{counted(report.read_text())} kernels compiled, {len(wrong)} with spills or a stack")
    tool = cuobjdump()
    if tool is None:
        wrong.append("no cuobjdump: pip install 'codellama_rt[cuda-build]'")
    else:
        kernels = disassemble(args.library, tool)
        print(table(kernels))
        wrong += faults(kernels)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
