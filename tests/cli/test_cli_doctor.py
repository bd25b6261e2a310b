"""`codellama-rt doctor`: what is installed, and what is missing."""

import json
import sys
from pathlib import Path

import numpy as np

import codellama_rt as clrt


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
    from codellama_rt.cli import doctor

    versions = {"mindspore": "2.10.0", "numpy": "2.1.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert "pip install 'numpy<2'" in doctor.examine(0.01)["mindspore"]
    del versions["mindspore"]
    assert "not installed" in doctor.examine(0.01)["mindspore"]


def test_doctor_tells_whether_the_graph_runtime_is_available(monkeypatch):
    from codellama_rt.cli import doctor

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
    from codellama_rt.cli import doctor

    broken = tmp_path / "libcodellama_rt_cpu.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in doctor._custom_ops(broken)
    mapped = Path("/proc/self/maps").read_text().split()
    another = next(word for word in mapped if "libc.so" in word)
    assert "lacks" in doctor._custom_ops(Path(another))
