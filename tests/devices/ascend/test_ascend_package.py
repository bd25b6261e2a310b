"""The package of kernels as MindSpore's builder makes it from CANN's op project.

CANN is a folder of the test's making, with the parts of its op project that the builder drives:
what they would compile is compiled here by g++, with the standard and the folders of the real one,
against the emulator's headers.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from codellama_rt.ops import ascend_library

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCES = REPOSITORY / "csrc" / "ascend"
EMULATOR = REPOSITORY / "tests" / "emulators" / "ascend"
PRESETS = {
    "configurePresets": [
        {"cacheVariables": {name: {"value": ""} for name in (
            "ASCEND_COMPUTE_UNIT", "ASCEND_CANN_PACKAGE_PATH", "vendor_name"
        )}}
    ]
}  # fmt: skip
# As CANN 8.1's project does: host code in C++11, all of op_host in one library; each kernel alone.
BUILD = f"""
set -e
mkdir -p build_out
g++ -std=c++11 -shared -fPIC -Wl,-z,defs -I {EMULATOR} op_host/*.cpp -o build_out/tiling.so
for kernel in op_kernel/*.cpp; do g++ -std=c++17 -fsyntax-only -I {EMULATOR} $kernel; done
cat > build_out/custom_opp.run <<'END'
presets=CustomProject/CMakePresets.json
vendor=$(grep -A1 '"vendor_name"' $presets | sed -n 's/.*"value": "\\(.*\\)"/\\1/p')
api=$ASCEND_CUSTOM_OPP_PATH/vendors/$vendor/op_api/lib
mkdir -p $api
cp CustomProject/build_out/tiling.so $api/libcust_opapi.so
cp -r CustomProject/op_kernel $api
END
"""


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """CANN's folder."""
    home = tmp_path / "cann"
    project = home / "tools" / "op_project_templates" / "ascendc" / "customize"
    for folder in (home / "include" / "register", project / "op_host", project / "op_kernel",
                   project.parent / "common"):  # fmt: skip
        folder.mkdir(parents=True)
    (home / "include" / "register" / "op_def_registry.h").touch()
    (project / "op_host" / "add_custom.cpp").write_text("#error of CANN's sample, to be removed")
    (project / "CMakePresets.json").write_text(json.dumps(PRESETS))
    (project / "build.sh").write_text(BUILD)
    return home


def test_the_package_is_built_and_found(toolkit, tmp_path, monkeypatch):
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", SOURCES, "-B", build, "-DCODELLAMA_RT_ASCEND=CANN",
         f"-DASCEND_HOME_PATH={toolkit}", f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", build, "--target", "ascend_package"],
    ):  # fmt: skip
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    package = build / "ascend_package" / "vendors" / "codellama_rt"
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", str(package))
    library = ascend_library.find_custom_ops()
    assert library == package / "op_api" / "lib" / "libcust_opapi.so"
    kernels = {path.name for path in (library.parent / "op_kernel").iterdir()}
    assert {f"{name}.cpp" for name in defined_ops()} <= kernels


def defined_ops() -> list[str]:
    """The ops of op_host, in the form in which CANN looks for their kernels."""
    text = "".join(path.read_text() for path in sorted((SOURCES / "op_host").glob("*.cpp")))
    names = re.findall(r"OP_ADD\((\w+)\);", text)
    assert len(names) == 6
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names]
