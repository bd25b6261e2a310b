"""What a build has, and what is said where something is missing."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from codellama_rt import ops
from codellama_rt.model.ascend import ops as ascend
from codellama_rt.ops import ascend_library

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "ascend"


def configure(folder, monkeypatch, *options):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    return subprocess.run(
        ["cmake", "-S", SOURCES, "-B", folder, *options], capture_output=True, text=True
    )


def test_cann_without_its_home_is_an_error(tmp_path, monkeypatch):
    result = configure(tmp_path, monkeypatch, "-DCODELLAMA_RT_ASCEND=CANN")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "CODELLAMA_RT_ASCEND=CANN needs the CANN toolkit: source its set_env.sh" in message


def test_a_home_that_is_no_toolkit_is_an_error(tmp_path, monkeypatch):
    result = configure(
        tmp_path, monkeypatch, "-DCODELLAMA_RT_ASCEND=CANN", f"-DASCEND_HOME_PATH={tmp_path}"
    )
    assert result.returncode != 0
    assert "no CANN toolkit in" in result.stderr


def test_another_kind_of_build_is_an_error(tmp_path, monkeypatch):
    result = configure(tmp_path, monkeypatch, "-DCODELLAMA_RT_ASCEND=ON")
    assert result.returncode != 0
    assert "must be OFF, EMU or CANN, got 'ON'" in result.stderr


def test_off_builds_nothing(tmp_path, monkeypatch):
    assert configure(tmp_path, monkeypatch).returncode == 0
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_without_ascend_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(tmp_path))
    usable, reason = ops.available("ascend")
    assert not usable
    assert reason.startswith("this build has no ascend kernels (build with CODELLAMA_RT_ASCEND=")
    assert reason.endswith("; available: cpu")


@pytest.mark.usefixtures("device")
def test_the_emulator_says_what_it_is():
    usable, reason = ops.available("ascend")
    assert usable
    assert reason == "emulated on this CPU, for tests: functional and slow, no NPU is used"


def test_without_the_device_an_op_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(tmp_path))
    x = SimpleNamespace(shape=(1, 16), dtype="float16", is_contiguous=lambda: True)
    with pytest.raises(RuntimeError, match="this build has no ascend kernels"):
        ascend.silu_and_mul(x)


def test_glue_of_another_mindspore_is_told(tmp_path, monkeypatch):
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    suffix = ascend_library.sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"_ascend{suffix}").write_bytes(b"no library")
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(tmp_path))
    usable, reason = ops.available("ascend")
    assert not usable
    assert "built for another MindSpore" in reason


@pytest.fixture
def real_build(tmp_path, monkeypatch):
    """A build with the glue of CANN, on a machine of the test's making."""
    glue = SimpleNamespace(emulated=False, opened=None)
    glue.open = lambda *paths: setattr(glue, "opened", paths)
    (tmp_path / f"_ascend{ascend_library.sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    monkeypatch.setenv("CODELLAMA_RT_ASCEND_LIBRARIES", str(tmp_path))
    monkeypatch.setattr(ascend_library, "_import_glue", lambda path: glue)
    for name in ("ASCEND_CUSTOM_OPP_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield glue
    ascend_library.load.cache_clear()


def test_a_machine_without_npu_is_told(real_build):
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    assert ops.available("ascend") == (
        False, "MindSpore finds no Ascend NPU (mindspore.hal.is_available); available: cpu"
    )  # fmt: skip


def test_op_packages_are_looked_for_where_cann_does(real_build, monkeypatch, tmp_path):
    monkeypatch.setattr(ascend_library, "_require_npu", lambda: None)
    usable, reason = ops.available("ascend")
    assert not usable
    assert "neither ASCEND_CUSTOM_OPP_PATH nor ASCEND_OPP_PATH set" in reason
    monkeypatch.setenv("ASCEND_OPP_PATH", str(tmp_path / "opp"))
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert "/b, " in ops.available("ascend")[1]
    for place in ("opp/vendors/codellama_rt", "b"):
        library = tmp_path / place / "op_api" / "lib" / "libcust_opapi.so"
        library.parent.mkdir(parents=True)
        library.touch()
        assert ops.available("ascend") == (True, f"kernels of {library}")
        ascend_library.load.cache_clear()
    assert real_build.opened == ("libnnopbase.so", str(library))


def test_libraries_without_the_symbols_are_told(real_build, monkeypatch, tmp_path):
    def refuse(*paths):
        raise RuntimeError("the Ascend libraries have no symbol aclCreateTensor")

    real_build.open = refuse
    monkeypatch.setattr(ascend_library, "_require_npu", lambda: None)
    monkeypatch.setattr(ascend_library, "find_custom_ops", lambda: tmp_path)
    assert "no symbol aclCreateTensor; available: cpu" in ops.available("ascend")[1]
