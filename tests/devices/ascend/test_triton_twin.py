"""The Triton twin of flash decoding: its results, and Huawei's own compiler up to its closed step.

Off by default: $CODELLAMA_RT_TRITON_PYTHON names the interpreter of an environment with
triton-ascend and ascendnpu-ir, as csrc/ascend/triton/compile.py says.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.builders import paged
from helpers.tolerances import assert_attention, assert_lse

from codellama_rt.ops import reference

TWIN = Path(__file__).resolve().parents[3] / "csrc" / "ascend" / "triton"


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("CODELLAMA_RT_TRITON_PYTHON")
    if not path:
        pytest.skip("CODELLAMA_RT_TRITON_PYTHON names no environment (csrc/ascend/triton)")
    return path


def run(python, *arguments):
    return subprocess.run(
        [python, *map(str, arguments)], cwd=TWIN, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def test_it_computes_what_the_oracle_computes(python, tmp_path, rng):
    case = paged(rng, [300, 1, 128, 129], [1] * 4, heads=(32, 2), head_dim=32, block_size=64,
                 dtype="float16", cache_dtype="float16")  # fmt: skip
    names = ("query", "key_cache", "value_cache", "block_tables", "seq_lens")
    np.savez(tmp_path / "in.npz", **dict(zip(names, case.arguments, strict=False)))
    result = run(python, "interpret.py", tmp_path / "in.npz", tmp_path / "out.npz")
    assert result.returncode == 0, result.stderr[-2000:]
    computed = np.load(tmp_path / "out.npz")
    expected, expected_lse = reference.paged_attention(*case.arguments)
    assert_attention(computed["out"], expected)
    assert_lse(computed["lse"], expected_lse)


def test_it_is_compiled_up_to_the_closed_step(python):
    result = run(python, "compile.py")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "attend, 32/32 heads", "attend, 64/8 heads", "merge"
    ]  # fmt: skip
    for line in lines[:2]:  # cube and vector cores, and what orders them
        assert {"mmadL1", "vexp", "sync_block_set", "sync_block_wait"} <= set(
            line.split("; ")[1].split(", ")
        )


def test_tiles_that_do_not_fit_are_refused(python):
    result = run(python, "compile.py", "--block-size", "2048")
    assert result.returncode == 1
    assert "attend, 64/8 heads: refused" in result.stdout
    assert "merge: compiled up to hivmc" in result.stdout  # it has no such tile
