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
def control_groups(monkeypatch, tmp_path):
    """Control groups of these files, the process's own first; the system has 10**12 bytes free."""

    def make(*groups):
        folders = [tmp_path / str(i) for i in range(len(groups))]
        for folder, files in zip(folders, groups, strict=True):
            folder.mkdir()
            for name, text in files.items():
                (folder / name).write_text(text)
        monkeypatch.setattr(memory.native, "control_groups", lambda controller: folders)
        monkeypatch.setattr(memory, "_meminfo", lambda _: 10**12)

    return make


def version_2(limit, current, inactive_file, high="max"):
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{current}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive_file}\nslab 1\n",
    }


def version_1(limit, usage, inactive_file, total_inactive_file):
    statistics = f"inactive_file {inactive_file}\ntotal_inactive_file {total_inactive_file}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": f"cache 7\n{statistics}",
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], 10**12),
        ([version_2("max", 100, 0)], 10**12),
        ([version_2(1000, 300, 50)], 750),
        ([version_2(1000, 1200, 0)], 0),
        ([version_2(1000, 300, 400)], 1000),  # read before the use fell
        ([version_2(10**13, 0, 0)], 10**12),
        ([version_2(1000, 300, 0, high=800)], 500),
        ([version_2("max", 300, 0, high=800)], 500),
        ([version_2(1000, 100, 0), version_2(2000, 1700, 100), version_2("max", 9, 0)], 400),
        ([version_1(1000, 300, 10, 50)], 750),
        ([version_1(2**63 - 4096, 300, 0, 0)], 10**12),  # how version 1 writes "no limit"
        ([version_1(5000, 300, 0, 0), version_1(600, 500, 0, 25)], 125),
        ([{"memory.max": "1000"}], 1000),  # a use that cannot be read
        ([{"memory.max": "", "memory.current": "1"}], 10**12),
        ([{"memory.max": "a lot", "memory.limit_in_bytes": "-1"}], 10**12),
        ([{}], 10**12),
    ],
)
def test_the_smallest_rest_of_all_control_groups_counts(control_groups, groups, expected):
    control_groups(*groups)
    assert available_bytes() == expected
