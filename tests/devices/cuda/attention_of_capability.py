"""Attention on the emulator, of what its environment says it is: ... MODULE OUT (an .npz)."""

import importlib.util
import sys

import numpy as np
from attention_cases import long_case, run

from codellama_rt.model.cuda import tensor

WORKSPACE_BYTES = 8 << 20


def main(module_path, out):
    spec = importlib.util.spec_from_file_location("_cuda_emulated", module_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["codellama_rt._cuda"] = module
    memory = tensor.Memory(WORKSPACE_BYTES)
    module.set_workspace(memory.pointer, WORKSPACE_BYTES)
    results = []
    for queries in (1, 20):
        results += run(long_case(np.random.default_rng(5), queries))
    np.savez(out, *[r.astype(np.float32) for r in results])


if __name__ == "__main__":
    main(*sys.argv[1:])
