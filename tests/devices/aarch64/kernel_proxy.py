"""A pytest plugin (`-p kernel_proxy`): `codellama_rt.ops` runs on another processor's kernels.

The command in $CODELLAMA_RT_KERNEL_SERVER (qemu-aarch64 and kernel_server) is started once; every
direct op is sent to it with its arrays' memory, and what it wrote is put where it belongs. The
tests of tests/ops then are that processor's, unchanged.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import shlex
import subprocess

import numpy as np

from codellama_rt import _core
from codellama_rt.ops import schema

OPS = ("quantize", *(name for name in schema.OPS if name != "decoder_layer"))


class Server:
    """The other processor's kernels, one call at a time."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.isa = self.process.stdout.readline().decode().strip()
        self.threads = 2

    def call(self, name: str, *arguments) -> None:
        buffers: dict[tuple[int, int], int] = {}  # (address, bytes): the same memory is sent once
        lines, scalars = [], []
        for argument in flatten(arguments):
            if isinstance(argument, (bool, int, float)):
                scalars.append(float(argument))
            else:
                lines.append(describe(argument, buffers))
        stream = self.process.stdin
        stream.write(b"buffers %d\n" % len(buffers))
        for address, num_bytes in buffers:
            stream.write(b"%d\n" % num_bytes + ctypes.string_at(address, num_bytes))
        stream.write(f"{name} {len(lines)} {len(scalars)}\n".encode())
        stream.write((" ".join(map(repr, scalars)) + "\n").encode() + "".join(lines).encode())
        stream.flush()
        self._take_results(buffers)

    def _take_results(self, buffers) -> None:
        stream = self.process.stdout
        status = stream.readline().decode().split()
        assert status, "the kernel server died"
        if status[0] != "ok":
            raise getattr(builtins, status[0])(stream.read(int(status[1])).decode())
        for address, num_bytes in buffers:
            after = stream.read(num_bytes)
            if after != ctypes.string_at(address, num_bytes):
                ctypes.memmove(address, after, num_bytes)


def flatten(arguments):
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            yield from argument[:8]
        else:
            yield argument


def describe(argument, buffers) -> str:
    """A tensor's line; its memory is entered among the buffers."""
    array = getattr(argument, "payload", argument)
    if not isinstance(array, np.ndarray):
        raise TypeError(
            "an op takes NumPy arrays, MindSpore Tensors or tensors with DLPack (__dlpack__), got "
            + type(argument).__name__
        )
    if array.ndim > 4:
        raise ValueError(f"a tensor of an op has at most 4 dimensions, got {array.ndim}")
    quantized = array is not argument
    span = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    span = span + array.itemsize if array.size and span >= 0 else 0
    buffer = buffers.setdefault((array.ctypes.data, span), len(buffers))
    shape, dtype = argument.shape, argument.dtype if quantized else array.dtype.name
    strides = [s // array.itemsize if s % array.itemsize == 0 else -1 for s in array.strides]
    if quantized:
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    sizes = " ".join(map(str, [*shape, *strides]))
    flags = f"{int(quantized)} {int(array.flags.writeable)} {array.nbytes if quantized else 0}"
    return f"{buffer} {dtype} {flags} {len(shape)} {sizes}\n"


def install() -> None:
    """Put the server's kernels in the place of this processor's."""
    server = Server(os.environ["CODELLAMA_RT_KERNEL_SERVER"])
    for name in OPS:
        setattr(_core, name, lambda *a, _name=name: server.call(_name, *a[:-1]))  # no num_threads

    def set_isa(name: str) -> None:
        if name != server.isa:
            raise ValueError(f"instruction set '{name}' is not available; available: {server.isa}")

    def set_num_threads(n: int) -> None:
        server.call("set_num_threads", n)
        server.threads = n

    _core.available_isas = lambda: [server.isa]
    _core.isa = lambda: server.isa
    _core.set_isa = set_isa
    _core.num_threads = lambda: server.threads
    _core.set_num_threads = set_num_threads


install()  # as the plugin is imported: conftest.py asks for the instruction sets after that
