"""Sizes as people write them, and what the process may still take."""

from pathlib import Path

import pytest

from codellama_rt.llm import memory
from codellama_rt.llm.memory import available_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1), (8_000_000_000, 8_000_000_000), ("17", 17), ("8GB", 8 * 10**9),
        ("7.5 GiB", 15 * 2**29), (" 1 kb ", 1000), ("2KiB", 2048), ("1.5MB", 1_500_000),
        ("3 TB", 3 * 10**12), ("1tib", 2**40), ("12B", 12), ("1 MiB", 2**20),
    ],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "8 XB", "1e9", "-1GB", "1,5GB", "8GB8", "nan", "∞"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"number and a unit such as '8GB', got"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, -1, "0", "0.0 GB", "0.0001 B"])
def test_sizes_that_are_not_positive(size):
    with pytest.raises(ValueError, match="must be positive, got"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [None, 1.5, True, b"8GB", [8]])
def test_types_that_are_no_size(size):
    with pytest.raises(TypeError, match="an int of bytes or a str like '8GB', got"):
        parse_bytes(size)


def test_available_is_less_than_all():
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < available_bytes() < total


@pytest.fixture
def control_group(monkeypatch, tmp_path):
    """A control group with this limit, use and reclaimable cache; the system has 10**12 free."""

    def make(limit, current, inactive_file):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nslab 1\n")
        monkeypatch.setattr(memory, "Path", lambda _: tmp_path)
        monkeypatch.setattr(memory, "_meminfo", lambda _: 10**12)

    return make


@pytest.mark.parametrize(
    ("limit", "current", "inactive_file", "expected"),
    [
        ("max", 100, 0, 10**12),
        (1000, 300, 50, 750),
        (1000, 1200, 0, 0),
        (10**13, 0, 0, 10**12),
    ],
)
def test_control_group(control_group, limit, current, inactive_file, expected):
    control_group(limit, current, inactive_file)
    assert available_bytes() == expected


def test_without_a_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(memory, "_meminfo", lambda _: 77)
    assert available_bytes() == 77
