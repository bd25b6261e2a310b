"""Peak memory of converting a synthetic checkpoint of 7B's shape from Meta's layout.

    python benchmarks/convert_memory.py --layers 32 --shards 1 --folder /somewhere/with/space

The checkpoint is written one tensor at a time from a seed; then another process converts it to
Hugging Face's layout and reports its peak resident memory, mapped files included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from codellama_rt.checkpoint.formats.meta_directory import PARAMS, meta_name, params_of
from codellama_rt.checkpoint.formats.pth_writer import PthLayout
from codellama_rt.checkpoint.formats.tensor_file import Entry, write_tensor_file
from codellama_rt.checkpoint.tensor_names import expected_shapes
from codellama_rt.llm.variants import VARIANTS

CONVERT = """
import re, sys
from pathlib import Path
from codellama_rt.tools.convert.convert import convert
convert(sys.argv[1], sys.argv[2], quantization=sys.argv[3] or None)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def write_synthetic(folder: Path, layers: int, shards: int) -> int:
    """Write the checkpoint and return its bytes."""
    config = dataclasses.replace(VARIANTS["CodeLlama-7b"].config, n_layers=layers)
    folder.mkdir()
    (folder / PARAMS).write_text(json.dumps(params_of(config)))
    total = 0
    for i in range(shards):
        entries = []
        for seed, (name, shape) in enumerate(expected_shapes(config).items()):
            theirs, axis = meta_name(name)
            cut = tuple(n // shards if a == axis else n for a, n in enumerate(shape))
            piece = 0 if axis is None else i
            entries.append(_entry(theirs, cut, [seed, piece]))
        layout = PthLayout(entries, f"consolidated.{i:02}")
        write_tensor_file(
            folder / f"consolidated.{i:02}.pth", layout, lambda e: None, lambda c: None
        )
        total += sum(entry.num_bytes for entry in entries)
    return total


def _entry(name: str, shape: tuple[int, ...], seed: list[int]) -> Entry:
    """Return finite bfloat16 of both signs, from random sign, mantissa and low exponent bits."""
    size = int(np.prod(shape))

    def read() -> np.ndarray:
        bits = np.random.default_rng(seed).integers(2**16, size=size, dtype=np.uint16)
        return ((bits & 0x81FF) | 0x3C00).view(np.uint8)

    return Entry(name, "BF16", shape, 2 * size, read)


def main() -> None:
    """Write, convert, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        size = write_synthetic(folder / "meta", options.layers, options.shards)
        started = perf_counter()
        command = [sys.executable, "-c", CONVERT, folder / "meta", folder / "hf"]
        done = subprocess.run(
            [*command, options.quantization], capture_output=True, text=True, check=True
        )
        peak = int(re.search(r"\d+", done.stdout)[0]) * 1024
        print(
            f"{options.layers} layers in {options.shards} shards, {size / 1e9:.2f} GB: peak "
            f"{peak / 1e9:.3f} GB resident, {perf_counter() - started:.1f} s"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
