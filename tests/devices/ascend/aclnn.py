"""The Ascend ops on NumPy arrays, through the C symbols that CANN generates for them."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p

import numpy as np

ACL_DTYPES = {"float32": 0, "float16": 1, "int32": 3, "bfloat16": 27}
FORMAT_ND = 2


class AclnnError(RuntimeError):
    """A call's error number, and the reason in words."""


class Aclnn:
    """The library of an EMU build."""

    def __init__(self, path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.aclCreateTensor.restype = c_void_p
        self.library.aclCreateIntArray.restype = c_void_p
        self.library.clrt_emu_last_error.restype = c_char_p

    def set_cores(self, num_cores: int) -> None:
        self.library.clrt_emu_set_cores(num_cores)

    def call(self, name: str, *arguments) -> None:
        """Both phases; arrays become tensors, lists aclIntArrays, floats doubles."""
        made = [self.make(argument) for argument in arguments]
        size, executor = c_uint64(), c_void_p()
        plan = getattr(self.library, f"aclnn{name}GetWorkspaceSize")
        self._check(plan(*made, ctypes.byref(size), ctypes.byref(executor)))
        workspace = np.full(max(size.value, 1), 0x7F, np.uint8)
        memory = c_void_p(workspace.ctypes.data if size.value else None)
        self._check(getattr(self.library, f"aclnn{name}")(memory, size, executor, None))

    def make(self, argument):
        if isinstance(argument, float):
            return c_double(argument)
        if isinstance(argument, list):
            values = (c_int64 * max(len(argument), 1))(*argument)
            return c_void_p(self.library.aclCreateIntArray(values, c_uint64(len(argument))))
        shape = (c_int64 * argument.ndim)(*argument.shape)
        strides = (c_int64 * argument.ndim)(*(s // argument.itemsize for s in argument.strides))
        return c_void_p(
            self.library.aclCreateTensor(
                shape, c_uint64(argument.ndim), c_int(ACL_DTYPES[argument.dtype.name]), strides,
                c_int64(0), c_int(FORMAT_ND), shape, c_uint64(argument.ndim),
                c_void_p(argument.ctypes.data),
            )
        )  # fmt: skip

    def _check(self, code: int) -> None:
        if code:
            raise AclnnError(f"{code}: {self.library.clrt_emu_last_error().decode()}")

    # The ops as in codellama_rt.ops.

    def rms_norm(self, x, weight, eps=1e-5):
        out = np.empty_like(x)
        self.call("ClrtRmsNorm", x, weight, float(eps), out)
        return out

    def add_rms_norm(self, x, residual, weight, eps=1e-5):
        out, residual_out = np.empty_like(x), np.empty_like(x)
        self.call("ClrtAddRmsNorm", x, residual, weight, float(eps), out, residual_out)
        return out, residual_out

    def silu_and_mul(self, gate_up):
        out = np.empty((len(gate_up), gate_up.shape[1] // 2), gate_up.dtype)
        self.call("ClrtSiluAndMul", gate_up, out)
        return out

    def reshape_and_cache(self, *arguments):
        self.call("ClrtReshapeAndCache", *arguments)

    def rope_and_cache(self, qkv, cos, sin, positions, key_cache, value_cache, slots):
        _, n_kv_heads, _, head_dim = key_cache.shape
        query = np.empty((len(qkv), qkv.shape[1] // head_dim - 2 * n_kv_heads, head_dim), qkv.dtype)
        self.call(
            "ClrtRopeAndCache", qkv, cos, sin, positions, key_cache, value_cache, slots, query
        )
        return query

    def paged_attention(self, query, key_cache, value_cache, tables, seq_lens, cu, *, scale=None):
        out, lse = np.empty_like(query), np.empty(query.shape[:2], np.float32)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.call(
            "ClrtPagedAttention", query, key_cache, value_cache, tables, seq_lens.tolist(),
            cu.tolist(), float(scale), out, lse,
        )  # fmt: skip
        return out, lse
