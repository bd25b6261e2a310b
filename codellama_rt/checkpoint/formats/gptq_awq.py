"""AWQ's and GPTQ's weights of 4 bits: three or four tensors per projection become one.

Both store a projection (out, in) as integers q from 0 to 15, and for each group of inputs a scale
and a zero point: w = (q - zero) * scale. Eight integers are in an int32.

* GPTQ (arXiv:2210.17323; AutoGPTQ, GPTQModel): qweight (in / 8, out) along the inputs, qzeros
  (groups, out / 8), scales (groups, out), and g_idx (in), the group of each input. Files of the
  first format store zero - 1.
* AWQ (arXiv:2306.00978; AutoAWQ's "gemm"): qweight (in, out / 8), qzeros (groups, out / 8), scales
  (groups, out). The eight columns of an int32 are in the order 0, 2, 4, 6, 1, 3, 5, 7.

Kernels take blocks of 32 in GGUF's layouts. Where every zero point is 8, Q4_0 is the same number,
and where it is a power of two, Q4_1; otherwise Q4_1 rounds the minimum, -zero * scale, to float16,
an error of at most 0.8 % of a scale. Groups that are no multiples of 32, or inputs in another order
than that of their groups (`desc_act`), have no such layout: those weights become floats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.mapped_files import MappedFile
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.ops.quantized import Quantized

METHODS = ("gptq", "awq")
_BLOCK = 32  # elements of Q4_0 and Q4_1
_PER_WORD = 8
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where column i of eight is in AWQ's words
_ONES = 0x11111111
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_GROUP_SIZES = 2**20
_OWN_FILES = {  # before config.json had a section: the method, and other names of keys
    "quantize_config.json": ("gptq", {}),
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
}


class PackedKind(NamedTuple):
    """What config.json says about the weights.

    Attributes:
        method: "gptq" or "awq".
        group_size: inputs per scale; None: all.
        is_symmetric: every zero point is 8.
        adds_one: zero points are stored less 1.
    """

    method: str
    group_size: int | None
    is_symmetric: bool
    adds_one: bool


def with_own_file(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return config.json with the section that the programs first kept in a file of its own.

    Raises:
        CheckpointError: the file is damaged.
    """
    for name, (method, keys) in _OWN_FILES.items():
        if values.get("quantization_config") is None and (folder / name).is_file():
            found = {keys.get(key, key): item for key, item in read_object(folder / name).items()}
            values = values | {"quantization_config": {"quant_method": method} | found}
    return values


def read_packed_kind(values: Mapping[str, Any], source: str) -> PackedKind | None:
    """Read the quantization_config of config.json.

    Args:
        values: config.json.
        source: its path.

    Returns:
        None where it is another method's, or nothing.

    Raises:
        CheckpointError: other than 4 bits, an unknown layout, or a value out of range.
    """
    section = values.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") not in METHODS:
        return None
    fields = ConfigFields(section, f"{source}: quantization_config")
    if fields.integer("bits", high=64) != 4:
        raise fields.fault("bits", "4", "other widths are not supported")
    size = fields.integer("group_size", low=-1, high=_GROUP_SIZES)
    if size == 0:
        raise fields.fault("group_size", "-1 or a positive integer")
    method = section["quant_method"]
    if method == "awq":
        version = section.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise fields.fault("version", "'gemm'", "other layouts are not supported")
        return PackedKind(method, None if size < 0 else size, False, False)
    layout = section.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise fields.fault("checkpoint_format", "'gptq' or 'gptq_v2'")
    is_symmetric = fields.flag("sym", False)
    return PackedKind(method, None if size < 0 else size, is_symmetric, layout == "gptq")


@dataclass(frozen=True)
class PackedProjection(StoredTensor):
    """A projection of integers, scales and zero points. `payload` is that of the integers."""

    kind: PackedKind
    qzeros: StoredTensor
    scales: StoredTensor
    order: np.ndarray | None  # (in) the group of each input; None: one group after another

    @property
    def is_whole(self) -> bool:
        """Always False: kernels do not read this layout."""
        return False

    @property
    def is_repacked(self) -> bool:
        """Whether the kernels have a layout for these numbers."""
        return self.weight_dtype is not None

    @property
    def float_dtype(self) -> np.dtype:
        """That of the scales."""
        assert self.scales.float_dtype is not None
        return self.scales.float_dtype

    @property
    def weight_dtype(self) -> str | None:
        """The layout for kernels; None where they have none."""
        if self.order is not None or self.shape[1] % _BLOCK or self._group_size % _BLOCK:
            return None
        if self.scales.encoding != "F16":
            return None
        return "q4_0" if self.kind.is_symmetric else "q4_1"

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.payload.nbytes for part in (self, self.qzeros, self.scales))

    @property
    def _group_size(self) -> int:
        return self.kind.group_size or self.shape[1]

    def view(self) -> Quantized:
        """Repack the weight and return it."""
        assert self.weight_dtype is not None
        zeros, scales = self._zeros(0, self.shape[0]), self.scales.view()
        if self.kind.is_symmetric and (zeros != 8).any():
            raise CheckpointError(
                f"{self.file}: tensor {self.qzeros.name!r}: expected zero points of 8, as sym says "
                f"in config.json, found {zeros[zeros != 8][0]}"
            )
        n_rows, n_blocks = self.shape[0], self.shape[1] // _BLOCK
        per_group = self._group_size // _BLOCK
        begin = 2 if self.weight_dtype == "q4_0" else 4
        blocks = np.empty((n_rows, n_blocks, begin + _BLOCK // 2), np.uint8)
        blocks[..., :2] = _halves(scales, per_group, n_blocks)
        if begin == 4:
            blocks[..., 2:4] = _halves(self._minima(zeros, scales), per_group, n_blocks)
        q = self._integers(0, n_rows).reshape(n_rows, n_blocks, 2, _BLOCK // 2)
        np.bitwise_or(q[:, :, 0], q[:, :, 1] << 4, out=blocks[..., begin:])
        return Quantized(blocks.reshape(n_rows, -1), self.weight_dtype, self.shape)

    def _minima(self, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return -zero * scale, the value of the integer 0, in float16."""
        with np.errstate(over="ignore", invalid="ignore"):
            exact = -(zeros.astype(np.float32) * scales.astype(np.float32))
            minima = exact.astype(np.float16)
        if (np.isinf(minima) & np.isfinite(exact)).any():
            raise CheckpointError(
                f"{self.file}: tensor {self.scales.name!r}: expected scales with which all weights "
                f"are in the range of float16, found {np.nanmin(exact):g}"
            )
        return minima

    def decode(self, begin: int, end: int) -> np.ndarray:
        """Return the rows begin..end as float32, which holds (q - zero) * scale exactly."""
        groups = self.order
        if groups is None:
            groups = np.arange(self.shape[1]) // self._group_size
        zeros = self._zeros(begin, end).T
        scales = self.scales.decode(0, len(zeros.T))[:, begin:end].T.astype(np.float32)
        q = self._integers(begin, end).astype(np.float32)
        with np.errstate(invalid="ignore"):  # 0 times inf, which check="finite" finds
            return (q - zeros[:, groups]) * scales[:, groups]

    def mappings(self) -> list[MappedFile]:
        """Return the mappings of all parts' files."""
        parts = (super(), self.qzeros, self.scales)
        return [mapping for part in parts for mapping in part.mappings()]

    def release(self) -> None:
        """Release the memory of the parts' mapped pages."""
        super().release()
        self.scales.release()

    def _integers(self, begin: int, end: int) -> np.ndarray:
        """Return q of the rows begin..end, uint8 (rows, in)."""
        words = self.payload.view("<u4")
        if self.kind.method == "gptq":
            words = words.reshape(-1, self.shape[0])[:, begin:end]
            return _unpacked(words.T, range(_PER_WORD))
        return _columns(words.reshape(self.shape[1], -1), _AWQ_ORDER, begin, end).T

    def _zeros(self, begin: int, end: int) -> np.ndarray:
        """Return the zero points of the rows begin..end, uint8 (groups, rows)."""
        words = self.qzeros.payload.view("<u4").reshape(self.qzeros.shape)
        order = _AWQ_ORDER if self.kind.method == "awq" else range(_PER_WORD)
        # one is added to the whole word, as GPTQModel does: a zero point of 0 has borrowed
        return _columns(words, order, begin, end, _ONES if self.kind.adds_one else 0)


def _columns(
    words: np.ndarray, order: Iterable[int], begin: int, end: int, added: int = 0
) -> np.ndarray:
    """Return the columns begin..end of the integers of words, uint8 (rows, end - begin)."""
    first = begin // _PER_WORD
    some = words[:, first : -(-end // _PER_WORD)] + np.uint32(added)
    skip = begin - first * _PER_WORD
    return _unpacked(some, order)[:, skip : skip + end - begin]


def _unpacked(words: np.ndarray, order: Iterable[int]) -> np.ndarray:
    """Return the integers of words (rows, n), uint8 (rows, 8 n); `order`: where each one is."""
    out = np.empty((*words.shape, _PER_WORD), np.uint8)
    for i, place in enumerate(order):
        out[..., i] = (words >> np.uint32(4 * place)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def _halves(values: np.ndarray, times: int, n_blocks: int) -> np.ndarray:
    """Return the bytes of float16 (groups, out), per row and block: uint8 (out, n_blocks, 2)."""
    per_block = np.repeat(values.T, times, axis=1)[:, :n_blocks]
    return np.ascontiguousarray(per_block).view(np.uint8).reshape(*per_block.shape, 2)


def join_packed(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    kind: PackedKind,
    biased: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Replace the parts of each projection by one tensor, under the name of its weight.

    Args:
        path: the directory.
        tensors: as the files name them.
        kind: what config.json says.
        biased: the projections with biases.

    Raises:
        CheckpointError: a part is missing, or its dtype, shape or values do not fit.
    """
    joined: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            parts = {p: tensors[f"{module}.{p}"] for p in _PARTS if f"{module}.{p}" in tensors}
            joined[f"{module}.weight"] = _join(path, module, parts, kind)
        elif f"{module}.qweight" not in tensors:
            joined[name] = tensor
        elif part == "bias" and module.rpartition(".")[2] not in biased:
            if tensor.payload.any():  # the first programs wrote zeros for every projection
                joined[name] = tensor
        elif part not in _PARTS:
            joined[name] = tensor
    return joined


def _join(
    path: Path, module: str, parts: Mapping[str, StoredTensor], kind: PackedKind
) -> PackedProjection:
    needed = _PARTS[:3]
    for part in needed:
        if part not in parts:
            raise CheckpointError(f"{path}: tensor '{module}.{part}': expected it, found none")
    weight, qzeros, scales = (parts[part] for part in needed)
    if scales.float_dtype is None or len(scales.shape) != 2 or 0 in scales.shape:
        raise _fault(scales, "floats (groups, out)")
    groups, n_out = scales.shape
    rows = weight.shape[0] if weight.shape else 0
    n_in = rows if kind.method == "awq" else rows * _PER_WORD
    packed_out = n_out // _PER_WORD
    expected = (n_in, packed_out) if kind.method == "awq" else (n_in // _PER_WORD, n_out)
    if weight.shape != expected or not n_in or n_out % _PER_WORD or weight.encoding != "I32":
        raise _fault(weight, f"I32 {expected} for scales {scales.shape}")
    if qzeros.shape != (groups, packed_out) or qzeros.encoding != "I32":
        raise _fault(qzeros, f"I32 {(groups, packed_out)}")
    size = kind.group_size or n_in
    if groups != -(-n_in // size):
        raise _fault(scales, f"{-(-n_in // size)} groups of {size} inputs each, of {n_in}")
    order = _order(parts["g_idx"], n_in, groups, size) if "g_idx" in parts else None
    name = f"{module}.weight"
    return PackedProjection(
        name, weight.file, "packed", (n_out, n_in), weight.payload, kind, qzeros, scales, order
    )


def _order(g_idx: StoredTensor, n_in: int, groups: int, size: int) -> np.ndarray | None:
    """Return the group of each input, None where they are one after another."""
    if g_idx.encoding != "I32" or g_idx.shape != (n_in,):
        raise _fault(g_idx, f"I32 {(n_in,)}")
    order = g_idx.payload.view("<i4")
    if order.min() < 0 or order.max() >= groups:
        raise CheckpointError(
            f"{g_idx.file}: tensor {g_idx.name!r}: expected groups from 0 to {groups - 1}, found "
            f"{order.min()} to {order.max()}"
        )
    return None if (order == np.arange(n_in) // size).all() else order


def _fault(tensor: StoredTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r}: expected {expected}, found {tensor.encoding} "
        f"{tensor.shape}"
    )
