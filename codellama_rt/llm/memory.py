"""How much memory this process may still take, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path

from codellama_rt.ops import native

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
    """Return the memory that can be taken without swapping.

    It is the system's, or what the limit of a control group (cgroup) leaves if that is less.
    """
    groups = [_left_in_group(folder) for folder in native.control_groups("memory")]
    return min([_meminfo("MemAvailable"), *(left for left in groups if left is not None)])


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


def _left_in_group(folder: Path) -> int | None:
    """Return what a control group's limit leaves, cache of files included; None: no limit.

    The kernel drops file pages that nobody has used for long before it refuses memory.
    """
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # versions 2, 2 and 1
    limits = [limit for name in names if (limit := _number(folder / name)) is not None]
    if not limits:
        return None
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    return max(min(limits) - used + min(_inactive_file(folder / "memory.stat"), used), 0)


def _inactive_file(path: Path) -> int:
    """Return the bytes of file pages not used for long; in version 1 `total_` has the subgroups."""
    try:
        statistics = path.read_text()
    except OSError:
        return 0
    found = dict(re.findall(r"^((?:total_)?inactive_file) (\d+)$", statistics, re.MULTILINE))
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    """Return the number that a file holds; None without one ("max", or no such file)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
