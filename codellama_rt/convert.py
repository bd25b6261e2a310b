"""Writes checkpoints: a Hugging Face directory becomes one with quantised weights.

Tensors are read, converted and written one at a time. All of it happens in a directory of another
name, which takes its own only when it is whole; config.json, without which no checkpoint opens, is
written last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from codellama_rt.checkpoint.hf_directory import read_directory
from codellama_rt.checkpoint.model_names import resolve_model
from codellama_rt.checkpoint.packed_weights import config_section, file_metadata, padded_bytes
from codellama_rt.checkpoint.safetensors_writer import Entry, sync, write_safetensors
from codellama_rt.checkpoint.stored_tensor import ENCODINGS, Counter, Progress, StoredTensor
from codellama_rt.checkpoint.strict_json import read_object
from codellama_rt.checkpoint.weight_loading import match_tensors
from codellama_rt.errors import CheckpointError
from codellama_rt.quantize import check_quantization, is_quantized, quantize_tensor, sources

_COMPANIONS = (  # files that belong to a model and stay as they are
    "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "LICENSE*", "USE_POLICY*",
)  # fmt: skip


def convert(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, quantization: str,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Writes a quantised checkpoint, which `LLM` then maps and uses as it lies.

    Memory is bounded by the largest tensor. An interrupted run leaves no `out`.

    Args:
        model: a directory in Hugging Face's layout, or a hub id.
        out: the directory to make; nothing may be there.
        quantization: "int8" or "int4": of the projections and the head. What else there is, and
            the tokenizer's files, stay as they are.
        progress: called with bytes done, bytes in all, and what is being done.

    Returns:
        `out`.

    Raises:
        CheckpointError: the model cannot be read, is no such directory, or is quantised already.
        ValueError: an unknown quantization.
        FileExistsError: `out` is there.
        OSError: it cannot be written.

    Example:
        >>> convert("CodeLlama-7b-hf", "CodeLlama-7b-int4", quantization="int4")  # doctest: +SKIP
        PosixPath('CodeLlama-7b-int4')
    """
    if quantization is None:
        raise ValueError("convert takes a quantization: int8 or int4")
    check_quantization(quantization)
    path, out = resolve_model(model), Path(out)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a directory in Hugging Face's layout, found a file; GGUF's "
            "quantised types are used as they lie, without conversion"
        )
    if out.exists():
        raise FileExistsError(f"{out} is there already; give --out another name, or remove it")
    stored = read_directory(path)
    if stored.quantization is not None:
        raise CheckpointError(
            f"{path}: expected weights to quantise, found them in {stored.quantization} already; "
            "convert the original"
        )
    tensors = sources(match_tensors(stored))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        _write(path, partial, tensors, quantization, progress)
        partial.chmod(0o777 & ~_umask())
        partial.rename(out)
    except BaseException:  # an interrupt, too, leaves nothing
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _write(
    source: Path, folder: Path, tensors: Mapping[str, StoredTensor], quantization: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    counter = Counter(sum(tensor.payload.nbytes for tensor in tensors.values()), progress)
    what = {True: f"quantising to {quantization}", False: "copying"}

    def written(entry: Entry) -> None:
        tensors[entry.name].release()
        counter.add(tensors[entry.name].payload.nbytes, what[is_quantized(entry.name)])

    packed = {name: tensor.shape for name, tensor in tensors.items() if is_quantized(name)}
    write_safetensors(
        folder / "model.safetensors", _entries(tensors, quantization),
        file_metadata(packed, quantization), written,
    )  # fmt: skip
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copy(file, folder)
    config = read_object(source / "config.json")
    config |= {"tie_word_embeddings": False, "quantization_config": config_section(quantization)}
    with open(folder / "config.json", "xb") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
        sync(file)


def _entries(tensors: Mapping[str, StoredTensor], quantization: str) -> list[Entry]:
    """Quantised ones, padded, first: so they begin at cache lines; then floats, wide ones first."""

    def packed(name: str, tensor: StoredTensor) -> Entry:
        num_bytes = padded_bytes(quantization, tensor.shape)
        return Entry(
            name, "U8", (num_bytes,), num_bytes,
            lambda: quantize_tensor(tensor, quantization).payload.reshape(-1),
        )  # fmt: skip

    def kept(name: str, tensor: StoredTensor) -> Entry:
        num_bytes = tensor.payload.nbytes
        return Entry(name, tensor.encoding, tensor.shape, num_bytes, lambda: tensor.payload)

    quantised = [packed(name, t) for name, t in tensors.items() if is_quantized(name)]
    floats = [kept(name, t) for name, t in tensors.items() if not is_quantized(name)]
    return quantised + sorted(floats, key=lambda entry: -ENCODINGS[entry.dtype].itemsize)


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
