"""A tensor where it lies in a mapped file, and the model such tensors make up."""

import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.mapped_files import MappedFile, MappedFiles
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.weights import Weight
from codellama_rt.ops.dtypes import ENCODINGS
from codellama_rt.ops.quantized import Quantized

Progress = Callable[[int, int, str], None]  # done bytes, total bytes, what is being done


def map_file(path: Path) -> np.ndarray:
    """Map a whole file read-only; parts of it are read when first touched.

    Args:
        path: a file that is not empty.

    Returns:
        uint8 (bytes of the file); the mapping lives as long as the array or a view of it.

    Raises:
        CheckpointError: the file is missing, unreadable, empty, or not a regular file.

    Example:
        >>> map_file(Path(__file__)).flags.writeable
        False
    """
    try:
        if not path.is_file():
            found = "a directory" if path.is_dir() else "no such file"
            raise CheckpointError(f"{path}: expected a regular file, found {found}")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: expected a checkpoint, found an empty file")
        return np.frombuffer(MappedFile(path), np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}") from None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file, not yet read.

    `encoding` is the file's word for the element type: F32, F16, BF16, or one of another class's.
    """

    name: str  # as in the file
    file: Path
    encoding: str
    shape: tuple[int, ...]
    payload: np.ndarray = field(repr=False)  # uint8, the tensor's bytes in the mapping

    @property
    def is_float(self) -> bool:
        """Whether the bytes are floats of this machine, usable in place."""
        return self.encoding in ENCODINGS

    @property
    def float_dtype(self) -> np.dtype | None:
        """The dtype that its floats are computed with; None for blocks of a quantised format."""
        return ENCODINGS.get(self.encoding)

    @property
    def weight_dtype(self) -> str | None:
        """The dtype of `ops.Quantized` that the bytes are, where an op takes them as they lie."""
        return None

    @property
    def is_whole(self) -> bool:
        """Whether the bytes lie in one piece, to be used in place."""
        return True

    @property
    def is_repacked(self) -> bool:
        """Whether `view` makes the weight anew, in the layout `weight_dtype`."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes in the files."""
        return self.payload.nbytes

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def view(self) -> Weight:
        """Return the tensor as a view of the file's mapping."""
        if self.weight_dtype is not None:
            return Quantized(self.payload, self.weight_dtype, self.shape)
        array = self.payload.view(ENCODINGS[self.encoding]).reshape(self.shape)
        # Old safetensors writers did not pad the header: kernels need whole-element addresses, so
        # such a tensor, and only such a one, is copied.
        return array if array.flags.aligned else array.copy()

    def decode(self, begin: int, end: int) -> np.ndarray:
        """Return the rows begin..end of axis 0 as floats; a view if the bytes are floats."""
        assert self.is_float, self.encoding
        flat = self.payload.view(ENCODINGS[self.encoding])
        row = self.size // self.shape[0]
        return flat[begin * row : end * row].reshape(end - begin, *self.shape[1:])

    def release(self) -> None:
        """Release the tensor's memory pages from this process; reading it again maps them again.

        What is read once, to be converted, would otherwise count as resident to the end.
        """
        mapping = self._mapping()
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = self.payload.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        if self.payload.nbytes:
            mapping.madvise(mmap.MADV_DONTNEED, begin, first + self.payload.nbytes - begin)

    def release_file(self) -> None:
        """Release the memory pages of the whole file, as `release` does."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping().madvise(mmap.MADV_DONTNEED)

    def mappings(self) -> list[MappedFile]:
        """Return the mappings of the files that have the tensor's bytes."""
        return [self._mapping()]

    def _mapping(self) -> MappedFile:
        mapping = self.payload
        while isinstance(mapping, np.ndarray):
            mapping = mapping.base
        return mapping.obj if isinstance(mapping, memoryview) else mapping


class DoubleTensor(StoredTensor):
    """A tensor of float64, which is computed with as float32."""

    @property
    def float_dtype(self) -> np.dtype:
        """Always float32."""
        return np.dtype(np.float32)

    def decode(self, begin: int, end: int) -> np.ndarray:
        """Return the rows begin..end of axis 0 as float32.

        Raises:
            CheckpointError: a finite value is beyond the range of float32.
        """
        row = self.size // self.shape[0]
        rows = self.payload[begin * row * 8 : end * row * 8].view("<f8")
        with np.errstate(over="ignore"):
            narrow = rows.astype(np.float32)
        if not np.array_equal(np.isfinite(rows), np.isfinite(narrow)):
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r}: expected float64 in the range of float32, "
                "found a larger value"
            )
        return narrow.reshape(end - begin, *self.shape[1:])


DOUBLE = "F64"  # in every format


def stored_tensor(
    name: str, file: Path, encoding: str, shape: tuple[int, ...], payload: np.ndarray
) -> StoredTensor:
    """Return a tensor of floats, or of elements that no model is made of."""
    kind = DoubleTensor if encoding == DOUBLE else StoredTensor
    return kind(name, file, encoding, shape, payload)


def mapped_files(tensors: Iterable[StoredTensor]) -> MappedFiles:
    """Return the files that tensors lie in, to see whether they have changed."""
    return MappedFiles(mapping for tensor in tensors for mapping in tensor.mappings())


@dataclass(frozen=True)
class StoredModel:
    """A model's files, opened and their headers checked; no weight has been read.

    Attributes:
        path: the directory or GGUF file; its tokenizer and chat template are there as well.
        config: of the model.
        tensors: by their names in Hugging Face's layout.
        generation_config: empty when there is none.
        name_in_file: Hugging Face's name of a tensor to the one that the files use.
        quantization: of a directory that `convert` wrote.
        metadata: of a GGUF file, with what it says of tokenizer and chat template; else None.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    generation_config: dict[str, Any]
    name_in_file: Callable[[str], str] = str
    quantization: str | None = None
    metadata: Mapping[str, Any] | None = None


class Counter:
    """Counts bytes up to their total, and tells each time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, count: int, what: str) -> None:
        """`count` more bytes are done, by doing `what`."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, what)
