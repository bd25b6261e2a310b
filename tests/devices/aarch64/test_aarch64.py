"""The CPU library cross-compiled for Arm hosts, and its kernel tests under qemu-user."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_build import COMPILER, REPOSITORY, kernel_server

EMULATOR = "qemu-aarch64"
# Under qemu an op takes some twenty times as long: every file, and of the largest the core.
FILES = {
    "test_add_rms_norm": "", "test_apply_rotary_pos_emb": "", "test_copy_blocks": "not 2_31",
    "test_embedding": "", "test_flash_attention": "dtypes or causal or scale",
    "test_linear": "not MindSpore", "test_merge_attention": "",
    "test_paged_attention": "dtypes_and_head_sizes or test_scale or finite or seen",
    "test_reshape_and_cache": "not 2_31", "test_rms_norm": "", "test_rope_and_cache": "",
    "test_silu_and_mul": "", "test_linear_quantized": "", "test_quantized_caches": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> str:
    """The command that runs the kernels of an aarch64 build."""
    missing = [name for name in (COMPILER, EMULATOR, "cmake") if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user")
    return f"{EMULATOR} -L /usr/aarch64-linux-gnu {kernel_server()}"


@pytest.mark.parametrize("name", FILES)
def test_kernels(server, name):
    path = [Path(__file__).parent, REPOSITORY, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "CODELLAMA_RT_KERNEL_SERVER": server,
        "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",  # they may name plugins
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "kernel_proxy", "-p", "no:cacheprovider",
        REPOSITORY / "tests" / "ops" / f"{name}.py", "-k", FILES[name] or "test",
    ]  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
