"""Attention on the emulator with the environment's capability: ... MODULE OUT (an .npz)."""

import importlib.util
import sys

import numpy as np
from attention_cases import long_case, run, with_values

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
        case = long_case(np.random.default_rng(5), queries)
        results += run(case)
        results += run(with_values(case, 695, np.inf)[0])
    np.savez(out, *[np.nan_to_num(r.astype(np.float32), nan=7e5) for r in results])


if __name__ == "__main__":
    main(*sys.argv[1:])
