"""How much memory this process may still take, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path

HUGE_PAGE_BYTES = 2**21  # that the KV cache is committed by
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes from 8000000000, "8GB" or "7.5 GiB".

    Raises:
        TypeError: neither int nor str.
        ValueError: not a positive size.

    Example:
        >>> parse_bytes("1.5 GiB")
        1610612736
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"a memory size is an int of bytes or a str like '8GB', got {size!r}")
    number = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if not match or match[2].upper() not in _UNITS:
            raise ValueError(f"a memory size is a number and a unit such as '8GB', got {size!r}")
        number = int(float(match[1]) * _UNITS[match[2].upper()])
    if number <= 0:
        raise ValueError(f"a memory size must be positive, got {size!r}")
    return number


def available_bytes() -> int:
    """Memory that can be taken without swapping: the system's, or the control group's if less."""
    system = _meminfo("MemAvailable")
    group = _control_group()
    return system if group is None else min(system, group)


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process, mapped files included: now, or the most there was."""
    name = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, value = line.split(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")


def _control_group() -> int | None:
    """Return what is left below the limit of this process's control group (version 2), if any."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
        statistics = (folder / "memory.stat").read_text()
    except OSError:
        return None
    if limit == "max":
        return None
    reclaimable = int(re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)[1])
    return max(int(limit) - current + reclaimable, 0)
