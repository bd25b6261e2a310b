"""Compare `codellama-rt estimate` with the memory that runs take: SmolLM2 and slices of 7B.

    python benchmarks/estimate_memory.py --layers 2 --folder /somewhere/with/space

Each run is a process of its own that opens the model, reads every weight, fills the caches of its
sequences and reports its peak resident memory, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from codellama_rt.llm.memory_plan import estimate, find_model
from codellama_rt.llm.plan import Plan
from codellama_rt.llm.variants import SHAPES
from codellama_rt.tools.bench.synthetic import write_directory

NAMED = "smollm2-135m-instruct"
LARGEST_ERROR = 0.03
RUN = """
import ctypes, json, sys
import numpy as np
from codellama_rt import SamplingParams, ops
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.memory import resident_bytes
ops.num_threads()
if hasattr(ctypes.CDLL(None), "malloc_trim"):  # compiling modules leaves megabytes free
    ctypes.CDLL(None).malloc_trim(0)
interpreter = resident_bytes()
context, count, options = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
with LLM(
    sys.argv[1], max_model_len=context, max_num_seqs=count, check="finite", **options
) as llm:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, llm.config.vocab_size, context - 4).tolist() for _ in range(count)]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    print(json.dumps([interpreter, resident_bytes(peak=True)]))
"""


class Case(NamedTuple):
    """A run: tokens per sequence, sequences, and options of `LLM`."""

    context: int
    num_seqs: int
    options: dict[str, Any]

    def describe(self) -> str:
        sizes = f"{self.num_seqs} x {self.context}"
        return ", ".join([sizes, *(f"{name} {value}" for name, value in self.options.items())])


CASES = [
    Case(1024, 1, {}),
    Case(2048, 4, {}),
    Case(4096, 1, {"dtype": "bfloat16"}),
    Case(2048, 1, {"dtype": "float16", "kv_dtype": "int8"}),
    Case(1024, 1, {"dtype": "float32"}),
    Case(4096, 1, {"quantization": "int8", "kv_dtype": "int8"}),
    Case(2048, 2, {"quantization": "int4", "kv_dtype": "int4"}),
]


def measure(model: str | Path, case: Case) -> tuple[int, int]:
    """Return the resident bytes of a process before the model, and the peak while it runs."""
    command = [sys.executable, "-c", RUN, str(model), str(case.context), str(case.num_seqs)]
    done = subprocess.run(
        [*command, json.dumps(case.options)], capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, model: str | Path) -> float:
    """Print a line for each case of a model; return the largest relative error."""
    largest = 0.0
    for case in CASES:
        found = estimate(
            find_model(model),
            Plan(**case.options),
            context=case.context,
            num_seqs=case.num_seqs,
        )
        interpreter, peak = measure(model, case)
        error = found.peak / peak - 1
        largest = max(largest, abs(error))
        print(
            f"{name:<24}{case.describe():<48}{found.peak / 1e6:>9.1f}{peak / 1e6:>10.1f}"
            f"{error:>+8.1%}{interpreter / 1e6:>8.1f}",
            flush=True,
        )
    return largest


def main() -> None:
    """Print the table; the exit code says whether every error is within 3 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of the slices; 0: none")
    parser.add_argument("--folder", type=Path, default=None, help="for the slices' weights")
    options = parser.parse_args()
    print(f"{'model':<24}{'run':<48}{'said MB':>9}{'took MB':>10}{'off':>8}{'Python':>8}")
    errors = [compare(NAMED, NAMED)]
    if options.layers:
        config = replace(SHAPES["7b"], n_layers=options.layers)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_directory(Path(folder) / "model", config)
            errors.append(compare(f"7b, {options.layers} layers", Path(folder) / "model"))
    print(f"at most {max(errors):.1%} off")
    sys.exit(max(errors) > LARGEST_ERROR)


if __name__ == "__main__":
    main()
