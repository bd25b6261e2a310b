"""Quotas of CPU time, read from trees of files as containers and systemd make them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codellama_rt.ops import native

V1 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"
V2_MOUNT = "41 23 0:38 / /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate"


def v1_mount(top="/", folder="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"):
    return f"{V1}\n32 31 0:29 {top} {folder} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"


def v1_quota(quota, period=100_000):
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


@pytest.fixture
def tree(tmp_path):
    """Writes a tree of files and returns its root."""

    def make(cgroup, mountinfo, groups):
        files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo}
        for folder, contents in groups.items():
            files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in contents.items()}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "groups", "quota"),
    [
        # Version 2: no limit, a container's own namespace, its group alone, nested slices.
        ("0::/", V2_MOUNT, {".": {"cpu.max": "max 100000"}}, math.inf),
        ("0::/", V2_MOUNT, {".": {"cpu.max": "150000 100000"}}, 1.5),
        ("0::/a.slice/b.scope", V2_MOUNT, {"a.slice/b.scope": {"cpu.max": "50000 100000"}}, 0.5),
        (
            "0::/user.slice/user-1000.slice/session-2.scope",
            V2_MOUNT,
            {
                "user.slice": {"cpu.max": "300000 100000"},
                "user.slice/user-1000.slice": {"cpu.max": "400000 200000"},
                "user.slice/user-1000.slice/session-2.scope": {"cpu.max": "max 100000"},
                "other.slice": {"cpu.max": "10000 100000"},
            },
            2.0,
        ),
        ("0::/a", V2_MOUNT, {"a/below": {"cpu.max": "1000 100000"}}, math.inf),  # not above us
        # Version 1: as above, the controllers mounted together or alone, names in another order.
        ("4:cpu,cpuacct:/", v1_mount(), {"cpu,cpuacct": v1_quota(-1)}, math.inf),
        ("4:cpu,cpuacct:/", v1_mount(), {"cpu,cpuacct": v1_quota(250_000)}, 2.5),
        (
            "5:cpuset:/x\n4:cpuacct,cpu:/a/b",
            v1_mount(controllers="cpuacct,cpu"),
            {"cpu,cpuacct/a": v1_quota(90_000, 30_000), "cpu,cpuacct/a/b": v1_quota(-1)},
            3.0,
        ),
        ("4:cpu:/", v1_mount("/", "/sys/fs/cgroup/cpu", "cpu"), {"cpu": v1_quota(20_000)}, 0.2),
        ("4:cpuset:/", v1_mount(controllers="cpuset"), {"cpu,cpuacct": v1_quota(1)}, math.inf),
        # Docker: the host's name of the group, whose mount shows only that; and one within it.
        (
            "4:cpu,cpuacct:/docker/abc",
            v1_mount("/docker/abc"),
            {"cpu,cpuacct": v1_quota(100_000), "cpu,cpuacct/docker/abc": v1_quota(900_000)},
            1.0,
        ),
        (
            "4:cpu,cpuacct:/docker/abc/in",
            v1_mount("/docker/abc"),
            {"cpu,cpuacct": v1_quota(-1), "cpu,cpuacct/in": v1_quota(70_000)},
            0.7,
        ),
        # The name leads nowhere, or out of the namespace: the group that is mounted counts.
        ("0::/../../kubepods/x", V2_MOUNT, {".": {"cpu.max": "200000 100000"}}, 2.0),
        ("4:cpu:/elsewhere", v1_mount("/docker/abc"), {"cpu,cpuacct": v1_quota(60_000)}, 0.6),
        ("4:cpu:/docker/abcd", v1_mount("/docker/abc"), {"cpu,cpuacct": v1_quota(60_000)}, 0.6),
        # Another group's folder, bound somewhere, says nothing of ours.
        (
            "0::/ours",
            "50 23 0:38 /theirs /sys/fs/cgroup/bound rw - cgroup2 cgroup2 rw\n" + V2_MOUNT,
            {"bound": {"cpu.max": "1000 100000"}, "ours": {"cpu.max": "400000 100000"}},
            4.0,
        ),
        # Both versions at once, the controller in one of them.
        (
            "4:cpu,cpuacct:/\n0::/init.scope",
            v1_mount() + "\n" + V2_MOUNT.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw"),
            {"cpu,cpuacct": v1_quota(120_000), "unified/init.scope": {}},
            1.2,
        ),
        # Names with blanks and backslashes, as mountinfo writes them.
        (
            "0::/a b",
            V2_MOUNT.replace(" / ", r" /a\040b "),
            {".": {"cpu.max": "100000 100000"}},
            1.0,
        ),
        (
            r"0::/app\x2done.slice",
            V2_MOUNT.replace(" / ", r" /app\134x2done.slice "),
            {".": {"cpu.max": "100000 100000"}},
            1.0,
        ),
        # What cannot be read is no limit.
        *[
            ("0::/", V2_MOUNT, {".": {"cpu.max": text}}, math.inf)
            for text in ("", "max", "100000", "0 100000", "-5 100000", "100000 0", "x y", "1 2 3")
        ],
        ("4:cpu:/", v1_mount(), {"cpu,cpuacct": v1_quota("lots")}, math.inf),
        ("4:cpu:/", v1_mount(), {"cpu,cpuacct": {"cpu.cfs_quota_us": "50000"}}, math.inf),
        ("", V2_MOUNT, {".": {"cpu.max": "100000 100000"}}, math.inf),
        ("0::/", "", {".": {"cpu.max": "100000 100000"}}, math.inf),
        ("rubbish\n::\n0:", "rubbish - cgroup2\n- - -\n" + V2_MOUNT, {".": {}}, math.inf),
    ],
)
def test_quota(tree, cgroup, mountinfo, groups, quota):
    assert native._core.cpu_quota(tree(cgroup, mountinfo, groups)) == pytest.approx(quota)


def test_no_proc_at_all(tmp_path):
    assert native._core.cpu_quota(str(tmp_path)) == math.inf
    assert native.control_groups("memory", str(tmp_path)) == []


def test_the_own_group_comes_first_and_the_top_last(tree):
    root = tree("9:memory:/a/b\n0::/a/b", V2_MOUNT, {})
    top = Path(f"{root}/sys/fs/cgroup")
    assert native.control_groups("memory", root) == [top / "a" / "b", top / "a", top]


IN_A_GROUP = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from codellama_rt import ops
print(ops.num_threads())
"""


@pytest.mark.parametrize(("quota", "threads"), [(50_000, 1), (100_000, 1), (150_000, 2)])
def test_the_default_number_of_threads_follows_the_quota(quota, threads):
    """Where a control group may be made: root, on the host or in a privileged container."""
    group = Path("/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup")
    version_1, group = group.name == "cpu", group / f"codellama_rt_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        if version_1:
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} 100000")
        environment = {**os.environ, "CODELLAMA_RT_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
        command = [sys.executable, "-c", IN_A_GROUP, str(group)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        expected = min(threads, len(os.sched_getaffinity(0)))
        assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr
    except OSError as error:
        pytest.skip(f"no quota can be set: {error}")
    finally:
        group.rmdir()
