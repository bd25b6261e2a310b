"""`codellama-rt doctor`: what is installed, and what is missing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import codellama_rt as clrt
from codellama_rt.cli import doctor
from codellama_rt.cli.doctor import better_isa_remark


def test_doctor_tells_what_there_is(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for word in ("numpy", "MindSpore", "instruction set", "threads", "GB/s", "bfloat16",
                 "KV caches", "int4", "q6_k", "custom ops", "device cpu", "device cuda",
                 "no: this build", "runtime graph"):  # fmt: skip
        assert word in out


def test_doctor_speaks_json(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["isa"] in found["isas"] == clrt.ops.available_isas()
    assert found["threads"] == clrt.ops.num_threads()
    assert found["read_bandwidth"] > 0
    assert found["devices"]["cpu"][0]
    assert not found["devices"]["ascend"][0]
    assert found["packages"]["numpy"] == np.__version__


RATES_OF_INTEL = {
    "avx512_bf16": {"float32": 350e9, "bfloat16": 165e9, "int8": 1500e9},
    "avx512_vnni": {"float32": 350e9, "bfloat16": 350e9, "int8": 1500e9},
    "avx512": {"float32": 350e9, "bfloat16": 350e9, "int8": 350e9},
}
RATES_OF_AMD = RATES_OF_INTEL | {
    "avx512_bf16": {"float32": 235e9, "bfloat16": 471e9, "int8": 940e9},
    "avx512_vnni": {"float32": 235e9, "bfloat16": 235e9, "int8": 940e9},
}


@pytest.mark.parametrize(
    ("rates", "isa", "remark"),
    [
        (RATES_OF_INTEL, "avx512_vnni", None),
        (RATES_OF_INTEL, "avx512_bf16", "avx512_vnni multiplies bfloat16 at 350 GOP/s here, "
         "avx512_bf16 at 165: set CODELLAMA_RT_ISA=avx512_vnni"),
        (RATES_OF_INTEL, "avx512", "set CODELLAMA_RT_ISA=avx512_vnni"),
        (RATES_OF_AMD, "avx512_bf16", None),
        (RATES_OF_AMD, "avx512_vnni", "set CODELLAMA_RT_ISA=avx512_bf16"),
    ],
)  # fmt: skip
def test_doctor_says_that_another_instruction_set_is_faster(rates, isa, remark):
    found = better_isa_remark(isa, rates)
    assert found is None if remark is None else remark in found


def test_doctor_prints_the_remark_and_leaves_the_instruction_set_alone(run, monkeypatch):
    monkeypatch.setattr(doctor, "better_isa_remark", lambda isa, rates: f"{isa} is slow")
    before = clrt.ops.isa()
    assert f"{before} is slow" in run("doctor")[1]
    assert clrt.ops.isa() == before


def test_doctor_says_that_the_kernels_are_not_built(run, monkeypatch):
    monkeypatch.delattr(clrt, "_core")
    monkeypatch.delattr(clrt, "ops", raising=False)
    for name in [name for name in sys.modules if name.startswith("codellama_rt.ops")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "codellama_rt._core", None)
    code, out, _ = run("doctor")
    assert code == 0
    assert "_core" in out
    assert "instruction set" not in out


def test_doctor_knows_which_numpy_mindspore_wants(monkeypatch):
    versions = {"mindspore": "2.10.0", "numpy": "2.1.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert "pip install 'numpy<2'" in doctor.examine(0.01)["mindspore"]
    del versions["mindspore"]
    assert "not installed" in doctor.examine(0.01)["mindspore"]


def test_doctor_tells_whether_the_graph_runtime_is_available(monkeypatch):
    for setting, expected in [
        ("graph_pipeline:true", "but slow: MS_DEV_RUNTIME_CONF is graph_pipeline:true"),
        ("graph_pipeline:false", "yes, by MindSpore 2.10.0"),
        ("", "import MindSpore first: set MS_DEV_RUNTIME_CONF=graph_pipeline:false"),
    ]:
        monkeypatch.setenv("MS_DEV_RUNTIME_CONF", setting)
        monkeypatch.setattr(doctor, "_version", {"mindspore": "2.10.0"}.get)
        assert expected in doctor._graph_runtime()
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert doctor._graph_runtime() == "no: needs MindSpore"


def test_doctor_names_a_library_that_does_not_load(tmp_path):
    broken = tmp_path / "libcodellama_rt_cpu.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in doctor._custom_ops(broken)
    mapped = Path("/proc/self/maps").read_text().split()
    another = next(word for word in mapped if "libc.so" in word)
    assert "lacks" in doctor._custom_ops(Path(another))
