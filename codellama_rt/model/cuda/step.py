"""The inputs of a step, contiguous in pinned memory: one copy takes them to the device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from codellama_rt.model.batch import Batch
from codellama_rt.model.cuda.tensor import DeviceTensor, Memory
from codellama_rt.ops import native

Rope = tuple[np.ndarray, np.ndarray, np.ndarray]  # cos, sin, index, from RotaryEmbedding


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step's inputs."""

    num_tokens: int
    num_seqs: int
    max_blocks: int
    num_logits: int
    half_head_dim: int

    def parts(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each input, in memory order."""
        rotations = ((self.num_tokens, self.half_head_dim), "float32")
        return {
            "cos": rotations,
            "sin": rotations,
            "rope_index": ((self.num_tokens,), "int32"),
            "token_ids": ((self.num_tokens,), "int32"),
            "slot_mapping": ((self.num_tokens,), "int32"),
            "logit_rows": ((self.num_logits,), "int32"),
            "cu_seqlens_q": ((self.num_seqs + 1,), "int32"),
            "seq_lens": ((self.num_seqs,), "int32"),
            "block_tables": ((self.num_seqs, self.max_blocks), "int32"),
        }


class Pinned:
    """Host memory that device copies access directly, as a NumPy array of bytes."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate the memory."""
        self._device = native.cuda()
        self.pointer = self._device.allocate_pinned(num_bytes)
        buffer = (ctypes.c_uint8 * num_bytes).from_address(self.pointer)
        self.bytes = np.frombuffer(buffer, np.uint8)

    def __del__(self) -> None:
        """Free the memory."""
        if getattr(self, "pointer", 0):
            self._device.release_pinned(self.pointer)


class Room:
    """Pinned and device memory that steps use one after another; it grows on demand."""

    def __init__(self) -> None:
        """Start without memory."""
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Provide at least so many bytes; the previous contents are no longer needed."""
        if num_bytes > self.num_bytes:
            self.num_bytes = 1 << (num_bytes - 1).bit_length()
            self.pinned, self.memory = Pinned(self.num_bytes), Memory(self.num_bytes)


class StepInputs:
    """A step's inputs on the host and on the device, by name.

    A step smaller than the shape fills the rest with tokens that change nothing: slot -1, no keys.
    """

    def __init__(self, shape: StepShape, room: Room) -> None:
        """Lay out both sides in memory that the previous step, if any, no longer uses."""
        self.shape = shape
        parts, self.num_bytes, offsets = shape.parts(), 0, {}
        for name, (sizes, _) in parts.items():
            offsets[name] = self.num_bytes
            self.num_bytes += -(-int(np.prod(sizes)) * 4 // 16) * 16
        room.grow(self.num_bytes)
        self._pinned, memory = room.pinned, room.memory
        self._pointer = memory.pointer
        self.host, self.device = {}, {}
        for name, (sizes, dtype) in parts.items():
            begin = offsets[name]
            end = begin + int(np.prod(sizes)) * 4
            self.host[name] = self._pinned.bytes[begin:end].view(dtype).reshape(sizes)
            self.device[name] = DeviceTensor(memory.pointer + begin, sizes, dtype, memory)

    def fill(self, batch: Batch, rope: Rope) -> None:
        """Write a batch to the host side; the previous copy must be complete."""
        host, shape = self.host, self.shape
        num_tokens, num_seqs = len(batch.token_ids), len(batch.seq_lens)
        cos, sin, index = rope
        np.take(cos, index, axis=0, out=host["cos"][:num_tokens])
        np.take(sin, index, axis=0, out=host["sin"][:num_tokens])
        host["rope_index"][:] = np.arange(shape.num_tokens)
        for name, filling in (("token_ids", 0), ("slot_mapping", -1), ("logit_rows", 0)):
            values = getattr(batch, name)
            host[name][: len(values)] = values
            host[name][len(values) :] = filling
        padding = shape.num_tokens - num_tokens  # queries of the unused sequences, one each
        host["cu_seqlens_q"][: num_seqs + 1] = batch.cu_seqlens_q
        host["cu_seqlens_q"][num_seqs + 1 :] = num_tokens + np.minimum(
            np.arange(1, shape.num_seqs - num_seqs + 1), padding
        )
        host["seq_lens"][:num_seqs] = batch.seq_lens
        host["seq_lens"][num_seqs:] = 0
        width = batch.block_tables.shape[1]
        host["block_tables"][:num_seqs, :width] = batch.block_tables

    def copy(self) -> None:
        """Start the copy to the device, on the current stream."""
        native.cuda().copy_async(self._pointer, self._pinned.pointer, self.num_bytes)
