"""What is installed, what the kernels run on, and what this machine gives them."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codellama_rt import __version__
from codellama_rt.llm.memory import available_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES = (
    *("numpy", "mindspore", "ml_dtypes", "sentencepiece", "protobuf", "tokenizers", "gguf"),
    *("typer", "rich", "huggingface_hub"),
)
_DEVICES = ("cpu", "cuda", "ascend")
_CLEARLY_FASTER = 1.3  # more than two measurements of one rate differ by


def examine(seconds: float = 0.2) -> dict[str, Any]:
    """Find all that `codellama-rt doctor` tells, by topic; nothing missing raises an exception.

    Args:
        seconds: spent on measuring each limit.
    """
    found: dict[str, Any] = {
        "codellama_rt": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "mindspore": _mindspore(),
        "cpu": _cpu_name(),
        "memory_available_bytes": available_bytes(),
    }
    try:
        from codellama_rt import ops
        from codellama_rt.model.kv_cache import KV_DTYPES
        from codellama_rt.ops.dtypes import FLOAT_DTYPES
        from codellama_rt.ops.native import _core
        from codellama_rt.ops.quantized import GGUF_BLOCKS, OWN_WEIGHT_DTYPES
        from codellama_rt.tools.limits import measure_limits, set_rates
    except ImportError as error:
        return found | {"kernels": str(error)}
    limits = measure_limits(seconds)
    rates = {isa: set_rates(isa, seconds / 4) for isa in ops.available_isas()}
    return found | {
        "kernels": "loaded",
        "isas": ops.available_isas(),
        "isa": ops.isa(),
        "isa_rates": rates,
        "isa_remark": better_isa_remark(ops.isa(), rates),
        "threads": ops.num_threads(),
        "read_bandwidth": limits.read_bandwidth,
        "flops": limits.flops,
        "cache_dtypes": KV_DTYPES,
        "weight_dtypes": (*FLOAT_DTYPES, *OWN_WEIGHT_DTYPES, *GGUF_BLOCKS),
        "custom_ops": _custom_ops(Path(_core.__file__).with_name("libcodellama_rt_cpu.so")),
        "runtimes": {"direct": "yes", "graph": _graph_runtime()},
        "devices": {name: ops.available(name) for name in _DEVICES},
    }


def better_isa_remark(isa: str, rates: Mapping[str, Mapping[str, float]]) -> str | None:
    """Return a sentence if another instruction set is clearly faster than `isa`, else None.

    Args:
        isa: the one in use.
        rates: by instruction set, best first, and dtype of the operands: OP/s on registers.
    """
    own = rates[isa]
    for dtype in own:
        for other, theirs in rates.items():
            no_slower = all(_CLEARLY_FASTER * theirs[name] > own[name] for name in own)
            if no_slower and theirs[dtype] > _CLEARLY_FASTER * own[dtype]:
                return (
                    f"{other} multiplies {dtype} at {theirs[dtype] / 1e9:.0f} GOP/s here, {isa} at "
                    f"{own[dtype] / 1e9:.0f}: set CODELLAMA_RT_ISA={other} "
                    "(results then differ in their last bits)"
                )
    return None


def render(found: dict[str, Any]) -> None:
    """Print it as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    missing = [name for name, version in found["packages"].items() if version is None]
    there = [f"{name} {version}" for name, version in found["packages"].items() if version]
    lines = [
        ("codellama_rt", f"{found['codellama_rt']}, Python {found['python']}"),
        ("packages", ", ".join(there) + (f"; not there: {', '.join(missing)}" if missing else "")),
        ("MindSpore", found["mindspore"]),
        ("CPU", found["cpu"]),
        ("memory", f"{found['memory_available_bytes'] / 1e9:.1f} GB available"),
        ("kernels", found["kernels"]),
    ]
    if found["kernels"] != "loaded":
        return lines
    flops = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in found["flops"].items())
    devices = [
        (f"device {name}", f"{'yes' if usable else 'no'}: {reason}")
        for name, (usable, reason) in found["devices"].items()
    ]
    return [
        *lines,
        ("instruction set", f"{found['isa']} (of {', '.join(found['isas'])})"),
        *([("", found["isa_remark"])] if found["isa_remark"] else []),
        ("threads", str(found["threads"])),
        ("read bandwidth", f"{found['read_bandwidth'] / 1e9:.1f} GB/s, measured now"),
        ("GFLOP/s", f"{flops}, measured now"),
        ("KV caches", ", ".join(found["cache_dtypes"])),
        (
            "weights",
            f"{', '.join(found['weight_dtypes'])}; other GGUF types become bfloat16 when opened",
        ),
        ("custom ops", found["custom_ops"]),
        ("runtime graph", found["runtimes"]["graph"]),
        *devices,
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _mindspore() -> str:
    """Return whether MindSpore is there, with a NumPy that it works with.

    With NumPy 2 it crashes now and then, and its wheel does not say so.
    """
    mindspore, numpy = _version("mindspore"), _version("numpy")
    if mindspore is None:
        return "not installed; ops and generate work on NumPy arrays, ops.graph needs it"
    if not (numpy or "").startswith("1."):
        return f"{mindspore} is built for NumPy 1.x, found {numpy}: pip install 'numpy<2'"
    return f"{mindspore}, and NumPy {numpy} fits it"


def _graph_runtime() -> str:
    """Tell whether `LLM(runtime="graph")` is available, and with which setting of MindSpore."""
    from codellama_rt.llm.placement import MINDSPORE_SETTINGS, NO_PIPELINE

    version = _version("mindspore")
    if version is None:
        return "no: needs MindSpore"
    settings = os.environ.get(MINDSPORE_SETTINGS, "")
    if NO_PIPELINE in settings:
        return f"yes, by MindSpore {version}"
    if "graph_pipeline" in settings:
        return (
            f"yes, by MindSpore {version}, but slow: {MINDSPORE_SETTINGS} is {settings}; "
            f"set {NO_PIPELINE}"
        )
    return (
        f"yes, by MindSpore {version}; programs that import MindSpore first: set "
        f"{MINDSPORE_SETTINGS}={NO_PIPELINE}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _custom_ops(library: Path) -> str:
    """Return whether MindSpore could load the operators from their library."""
    from codellama_rt.ops.schema import OPS

    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return f"cannot be loaded: {error}"
    missing = [name for name in OPS if not hasattr(loaded, f"clrt_{name}")]
    if missing:
        return f"{library} lacks {', '.join(missing)}"
    return f"{len(OPS)} in {library.name}"
