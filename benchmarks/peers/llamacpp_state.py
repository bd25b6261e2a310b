"""Lengthen llama.cpp's saved sequences: a deep cache without computing the prompt."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np


class _Reader:
    """Take numbers and bytes off a buffer, in order."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer, self.at = buffer, 0

    def numbers(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self.buffer, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def rows(self, count: int, num_bytes: int) -> np.ndarray:
        rows = np.frombuffer(self.buffer, np.uint8, count * num_bytes, self.at)
        self.at += rows.size
        return rows.reshape(count, num_bytes)


def lengthened(state: bytes, depth: int) -> np.ndarray:
    """Return the state of one sequence with its cells repeated up to `depth` tokens.

    Args:
        state: from llama_state_seq_get_data, one stream, laid out by llama_kv_cache::state_write.
        depth: number of cells.

    Returns:
        uint8 for llama_state_seq_set_data.

    Raises:
        RuntimeError: an unknown layout.
    """
    pieces = list(_pieces(_Reader(state), depth))
    out = np.empty(sum(piece.size for piece in pieces), np.uint8)
    end = 0
    for piece in pieces:
        out[end : end + piece.size] = piece
        end += piece.size
    return out


def _bytes(layout: str, *values: int) -> np.ndarray:
    return np.frombuffer(struct.pack("<" + layout, *values), np.uint8)


def _pieces(reader: _Reader, depth: int) -> Iterator[np.ndarray]:
    yield _bytes("II", *reader.numbers("II"))  # magic, sequence
    streams, count = reader.numbers("II")
    if streams != 1:
        raise RuntimeError(f"llama.cpp's state has {streams} streams instead of one")
    yield _bytes("II", 1, depth)
    reader.rows(count, 12)  # position, number of sequences, sequence: of each cell
    cells = np.zeros((depth, 3), np.int32)
    cells[:, 0], cells[:, 1] = np.arange(depth), 1
    yield cells.view(np.uint8).reshape(-1)
    values_transposed, n_layers = reader.numbers("II")
    yield _bytes("II", values_transposed, n_layers)
    for i in range(2 * n_layers):  # keys of all layers, then values
        if i >= n_layers and values_transposed:
            kind, item, width = reader.numbers("iII")
            yield _bytes("iII", kind, item, width)
            rows = reader.rows(width, count * item)
            yield np.tile(rows, (1, -(-depth // count)))[:, : depth * item].reshape(-1)
        else:
            kind, row_bytes = reader.numbers("iQ")
            yield _bytes("iQ", kind, row_bytes)
            yield np.resize(reader.rows(count, row_bytes), depth * row_bytes)
    if reader.at != len(reader.buffer):
        raise RuntimeError(
            f"llama.cpp's state has an unknown layout: {reader.at} of "
            f"{len(reader.buffer)} bytes understood"
        )
