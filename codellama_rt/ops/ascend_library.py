"""Find and load the Ascend kernels, or explain why they are not available."""

from __future__ import annotations

import functools
import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType

from codellama_rt.errors import unavailable

EMULATOR = "libcodellama_rt_ascend_emu.so"
CUSTOM_OPS = Path("op_api", "lib", "libcust_opapi.so")  # in the folder of a CANN op package
VENDOR = "codellama_rt"


class AscendUnavailable(RuntimeError):
    """The Ascend device cannot be used; the message says why."""


def folder() -> Path:
    """Return the folder of the Ascend libraries.

    The package's own folder, unless $CODELLAMA_RT_ASCEND_LIBRARIES names another.

    Raises:
        ValueError: the variable does not name a folder.
    """
    asked = os.environ.get("CODELLAMA_RT_ASCEND_LIBRARIES")
    if not asked:
        return Path(__file__).resolve().parent.parent
    if not Path(asked).is_dir():
        raise ValueError(f"CODELLAMA_RT_ASCEND_LIBRARIES={asked}: expected a folder")
    return Path(asked)


def available() -> tuple[bool, str]:
    """Return whether the Ascend kernels can run here, with a description or the reason.

    The only reliable way to know is to load the libraries, so this does.
    """
    try:
        glue = load(folder())
    except AscendUnavailable as error:
        return False, unavailable(str(error))
    if glue.emulated:
        return True, "emulated on this CPU, for tests: functional and slow, no NPU is used"
    return True, f"kernels of {find_custom_ops()}"


@functools.cache
def load(where: Path) -> ModuleType:
    """Return the extension module of a build, with its libraries opened.

    Raises:
        AscendUnavailable: the build has no Ascend module, or something it needs is missing.
    """
    path = where / f"_ascend{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        raise AscendUnavailable(
            "this build has no ascend kernels (build with CODELLAMA_RT_ASCEND=CANN, see "
            "csrc/ascend/README.md)"
        )
    glue = _import_glue(path)
    libraries = (str(where / EMULATOR),) * 2
    if not glue.emulated:
        _require_npu()
        libraries = ("libnnopbase.so", str(find_custom_ops()))
    try:
        glue.open(*libraries)
    except RuntimeError as error:
        raise AscendUnavailable(f"the ascend kernels cannot be loaded: {error}") from None
    return glue


def find_custom_ops() -> Path:
    """Return the library of the installed op package, by CANN's search order (first match wins).

    Raises:
        AscendUnavailable: no op package is installed.
    """
    folders = [Path(p) for p in os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":") if p]
    if "ASCEND_OPP_PATH" in os.environ:
        folders.append(Path(os.environ["ASCEND_OPP_PATH"], "vendors", VENDOR))
    for place in folders:
        if (place / CUSTOM_OPS).is_file():
            return place / CUSTOM_OPS
    looked = (
        ", ".join(map(str, folders)) or "neither ASCEND_CUSTOM_OPP_PATH nor ASCEND_OPP_PATH set"
    )
    raise AscendUnavailable(
        f"no op package with {CUSTOM_OPS} ({looked}); install it and source CANN's set_env.sh"
    )


def _import_glue(path: Path) -> ModuleType:
    """Import MindSpore first: the extension module needs its symbols."""
    try:
        import mindspore  # noqa: F401
    except ImportError as error:
        raise AscendUnavailable(f"the ascend kernels need MindSpore: {error}") from None
    spec = importlib.util.spec_from_file_location("_ascend", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise AscendUnavailable(
            f"the ascend module was built for another MindSpore: {error}"
        ) from None
    return module


def _require_npu() -> None:
    from mindspore import hal

    if not hal.is_available("Ascend"):
        raise AscendUnavailable("MindSpore finds no Ascend NPU (mindspore.hal.is_available)")
