"""Opens a checkpoint: a directory of Hugging Face's or Meta's, a GGUF file, or a name for one.

Weights stay where they lie: each is a view of a read-only mapping of its file, so opening a model
costs the reading of headers, and its pages are shared with every process that maps them. Only what
is asked for in another dtype, or repacked, is made anew, a tensor at a time.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.finiteness import check_finite
from codellama_rt.checkpoint.mapped_files import MappedFiles
from codellama_rt.checkpoint.open import Opened, resolve
from codellama_rt.checkpoint.quantize import check_quantization
from codellama_rt.checkpoint.stored_tensor import Progress, mapped_files
from codellama_rt.checkpoint.tensor_names import assemble
from codellama_rt.checkpoint.weight_loading import load_arrays
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.weights import LlamaWeights, Weight
from codellama_rt.ops.dtypes import numpy_dtype
from codellama_rt.ops.quantized import Quantized


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: configuration, weights, and where its tokenizer is."""

    path: Path
    config: ModelConfig  # its dtype is that of the projections, or of the floats beside them
    weights: LlamaWeights
    generation_config: dict[str, Any]  # empty when there is none
    tokenizer_path: Path  # the directory or GGUF file
    stored_bytes: int  # of the tensors in the files
    mapped_bytes: int  # of the weights that are used where they lie in the files
    files: MappedFiles  # that the weights are views of, to check before each use


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    repack: bool = False,
    check: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a model's weights and configuration, and check that they fit together.

    Args:
        model: a directory in Hugging Face's or Meta's layout, a GGUF file, a built-in name, or a
            hub id.
        dtype: "auto" keeps the stored dtype and copies nothing, GGUF's Q4_0, Q4_1, Q5_0, Q5_1,
            Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K included (its other quantised types
            become bfloat16; norms keep their own; what Meta's files hold in shards is put
            together); "float32", "float16", "bfloat16" convert what differs.
        quantization: "int8" or "int4" quantises the projections and the head, a tensor at a time.
            None keeps what is stored; so it opens what `convert` quantised.
        repack: copy GGUF's blocks into the kernels' order, and a small model's weights into huge
            pages, which is faster, as `LLM` does; the results are the same to the bit.
        check: "finite" reads every weight and rejects NaN and infinities; None skips the check.
        progress: called with bytes done, bytes in all, and what is being done.

    Returns:
        The checkpoint; what is mapped or converted is read-only.

    Raises:
        CheckpointError: the files are missing, damaged, contradictory, of another architecture, or
            quantised otherwise.
        ValueError: an unknown dtype, quantization or check.
        TypeError: model is not a path or a name.
        RuntimeError: a named model cannot be fetched.

    Example:
        >>> open_checkpoint("smollm2-135m-instruct").config.n_layers  # doctest: +SKIP
        30
    """
    return load_checkpoint(
        resolve(model),
        dtype=dtype,
        quantization=quantization,
        repack=repack,
        check=check,
        progress=progress,
    )


def load_checkpoint(
    opened: Opened,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    repack: bool = False,
    check: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Load the weights of a model whose headers are read.

    Args:
        opened: from `resolve`.
        dtype: as in `open_checkpoint`.
        quantization: as in `open_checkpoint`.
        repack: as in `open_checkpoint`.
        check: as in `open_checkpoint`.
        progress: as in `open_checkpoint`.

    Raises:
        CheckpointError, ValueError: as `open_checkpoint`; also a file has changed since `resolve`.
    """
    float_dtype, tensors = opened.float_dtype(dtype), opened.tensors
    if check not in (None, "finite"):
        raise ValueError(f"check must be None or 'finite', got {check!r}")
    check_quantization(quantization)
    check_stored_quantization(opened, quantization)
    arrays = load_arrays(
        tensors,
        numpy_dtype(float_dtype),
        is_auto=dtype == "auto",
        quantization=quantization,
        repack=repack,
        progress=progress,
    )
    if check == "finite":
        check_finite(tensors, arrays, progress)
    files = mapped_files(tensors.values())
    files.check()  # what was converted may have been read while it was written
    weights = assemble(arrays, opened.config.n_layers)
    projection = weights.layers[0].q_proj
    if not isinstance(projection, Quantized):
        float_dtype = projection.dtype.name
    stored_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    mapped_bytes = sum(
        tensor.num_bytes
        for name, tensor in tensors.items()
        if np.may_share_memory(_bytes_of(arrays[name]), tensor.payload)
    )
    return Checkpoint(
        opened.path,
        dataclasses.replace(opened.config, dtype=float_dtype),
        weights,
        opened.generation_config,
        opened.path,
        stored_bytes,
        mapped_bytes,
        files,
    )


def _bytes_of(weight: Weight) -> np.ndarray:
    return weight.payload if isinstance(weight, Quantized) else weight


def check_stored_quantization(opened: Opened, quantization: str | None) -> None:
    """Refuse to quantise what is quantised otherwise.

    Raises:
        CheckpointError: it is.
    """
    if opened.quantization is not None and quantization not in (None, opened.quantization):
        raise CheckpointError(
            f"{opened.path}: expected weights to quantise to {quantization}, found them in "
            f"{opened.quantization} already; leave quantization out, or convert the original again"
        )
