"""Give up all that a program written by a model does not need: limits, ids, files, signals."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from typing import NamedTuple

from codellama_rt.tools.evaluation.usage import MAX_TASKS

_MAX_FILE_BYTES = 2**24
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_FILTER = 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)


class Settings(NamedTuple):
    """What the evaluator asks for."""

    timeout_s: float
    memory_bytes: int  # address space of a process, and resident memory of all
    folder: str
    user: int | None  # id to run the program as, which no other process has
    namespace: bool  # this process is the first of a PID namespace


class Calls(NamedTuple):
    """Numbers of an architecture's system calls."""

    architecture: int  # as seccomp names it
    capset: int
    # prlimit64, sched_setaffinity, _setscheduler, _setparam, _setattr: first argument 0 is the
    # caller, others are processes of the same user, such as the supervisor.
    on_itself: tuple[int, ...]
    never: tuple[int, ...]  # shmget, semget, msgget: what they make outlives the program


_CALLS = {
    "x86_64": Calls(0xC000003E, 126, (302, 203, 144, 142, 314), (29, 64, 68)),
    "aarch64": Calls(0xC00000B7, 91, (261, 122, 119, 118, 274), (194, 190, 186)),
}


def enter_limits(channel: int, settings: Settings) -> None:
    """Give up what a program does not need; `channel` is the only open file that stays."""
    os.setsid()
    os.chdir(settings.folder)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, channel)
    os.closerange(channel + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    tasks = MAX_TASKS
    if settings.user is None:
        tasks += _tasks_of_user()
    limits = {
        resource.RLIMIT_CPU: int(settings.timeout_s) + 1,
        resource.RLIMIT_AS: settings.memory_bytes,
        resource.RLIMIT_FSIZE: _MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        highest = resource.getrlimit(name)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(name, (value, value))
    if settings.user is not None:
        os.setgroups([])
        os.setresgid(settings.user, settings.user, settings.user)
        os.setresuid(settings.user, settings.user, settings.user)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # its folder in /proc is its own again
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _confine_to(".")  # its path may be hidden from the user
    if os.uname().machine in _CALLS:
        _restrict(_CALLS[os.uname().machine])


def _tasks_of_user() -> int:
    """Count the processes and threads of this user, which RLIMIT_NPROC counts, too."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _confine_to(folder: str) -> None:
    """Forbid writing elsewhere, tracing and signalling others, and TCP, by Landlock if possible."""
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    writes = 0x1FF2  # write, make and remove files of every kind
    writes |= (version >= 2) << 13 | (version >= 3) << 14  # move between folders; truncate
    tcp = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = (ctypes.c_uint64 * 3)(writes, tcp, scope)
    rules = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(24), 0)
    to_files = 2 | writes & 1 << 14
    for path, allowed in ((folder, writes), (os.devnull, to_files)):
        opened = os.open(path, os.O_PATH)
        rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _LIBC.syscall(_LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(opened)
    if rules < 0 or _LIBC.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock")
    os.close(rules)


def _restrict(calls: Calls) -> None:
    """Drop all capabilities, which no later exec restores, and filter system calls by seccomp."""
    load, equal, above, leave = 0x20, 0x15, 0x35, 0x06  # BPF instructions
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, calls.architecture), (leave, 0, 0, refuse)]
    code += [(load, 0, 0, 0), (above, 0, 1, 0x40000000), (leave, 0, 0, refuse)]  # x32
    for number in calls.never:
        code += [(equal, 0, 1, number), (leave, 0, 0, refuse)]
    low = 16 if sys.byteorder == "little" else 20  # half of the first argument
    for number in calls.on_itself:
        code += [(equal, 0, 4, number), (load, 0, 0, low), (equal, 0, 1, 0)]
        code += [(leave, 0, 0, allow), (leave, 0, 0, refuse)]
    code.append((leave, 0, 0, allow))
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(packed))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if (
        _LIBC.syscall(calls.capset, header, (ctypes.c_uint32 * 6)()) != 0
        or _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "capabilities or seccomp")
