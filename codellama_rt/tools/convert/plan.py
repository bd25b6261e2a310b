"""What a conversion writes: files of tensors, each tensor with its source, and text files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.formats.hf_writer import (
    INDEX,
    hf_config,
    index_of,
    shard_name,
    split_shards,
)
from codellama_rt.checkpoint.formats.meta_directory import MAX_SHARDS, PARAMS, params_of
from codellama_rt.checkpoint.formats.packed_weights import (
    config_section,
    file_metadata,
    padded_bytes,
)
from codellama_rt.checkpoint.formats.pth_writer import PthLayout
from codellama_rt.checkpoint.formats.safetensors import SafetensorsLayout
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.formats.tensor_file import Entry, Layout
from codellama_rt.checkpoint.quantize import is_quantized, quantize_tensor, sources
from codellama_rt.checkpoint.stored_tensor import Counter, StoredModel, StoredTensor
from codellama_rt.checkpoint.tensor_names import (
    COLUMNS,
    halves_first,
    meta_name,
    pairs_first,
    rotates,
)
from codellama_rt.checkpoint.weight_loading import choose_dtype, convert_tensor
from codellama_rt.ops.dtypes import ENCODINGS, FLOATS, numpy_dtype

HUGGING_FACE, META = "huggingface", "meta"
TARGETS = (HUGGING_FACE, META)
MAX_FILE_BYTES = 5 * 10**9  # per file of floats, unless one tensor is larger
Reorder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Options:
    """The options of a conversion.

    Attributes:
        to: one of `TARGETS`.
        quantization: "int8", "int4" or None.
        dtype: of all floats; "auto" keeps each tensor's own, or uses bfloat16 if some are in
            GGUF's blocks.
        shards: number of files in Meta's layout.
    """

    to: str = HUGGING_FACE
    quantization: str | None = None
    dtype: str = "auto"
    shards: int = 1


@dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
        files: layout by file name.
        made_from: the source tensor of each entry, by the entry's name.
        texts: JSON by file name; the file without which no checkpoint opens comes last.
    """

    files: dict[str, Layout]
    made_from: dict[str, StoredTensor]
    texts: dict[str, dict[str, Any]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(e.num_bytes for layout in self.files.values() for e in layout.entries)


def with_dtype(stored: StoredModel, options: Options) -> Options:
    """Return the options with a dtype if "auto" cannot keep the stored one.

    Raises:
        CheckpointError: as for `make_plan`.
    """
    is_kept = all(tensor.float_dtype is not None for tensor in stored.tensors.values())
    return options if options.dtype != "auto" or is_kept else replace(options, dtype="bfloat16")


def make_plan(stored: StoredModel, options: Options) -> Plan:
    """Plan a conversion; only headers have been read so far.

    Raises:
        CheckpointError: the model has missing or unknown tensors.
        ValueError: the layout cannot express the model.
    """
    tensors = stored.tensors
    if options.to == META:
        return _meta_plan(stored, tensors, options)
    if options.quantization is not None:
        return _quantized_plan(stored, tensors, options)
    entries = [_entry(stored, name, tensor, options, name) for name, tensor in tensors.items()]
    shards = split_shards(entries, MAX_FILE_BYTES)
    files = {
        shard_name(i, len(shards)): SafetensorsLayout(shard, {"format": "pt"})
        for i, shard in enumerate(shards)
    }
    texts = {INDEX: index_of(shards)} if len(shards) > 1 else {}
    return Plan(files, tensors, texts | {"config.json": _hf_config(stored, tensors, options)})


def _hf_config(
    stored: StoredModel, tensors: Mapping[str, StoredTensor], options: Options
) -> dict[str, Any]:
    """Return config.json: the source's own, if it has one."""
    dtype = choose_dtype(tensors).name if options.dtype == "auto" else options.dtype
    file = stored.path / "config.json"
    if not (stored.path.is_dir() and file.exists()):
        return hf_config(stored.config) | {"torch_dtype": dtype}
    config = read_object(file)
    config.pop("quantization_config", None)  # of GPTQ or AWQ: floats are written
    if options.dtype != "auto":
        config.pop("dtype", None)
        config["torch_dtype"] = dtype
    return config


def _order(stored: StoredModel, name: str, to: str) -> Reorder | None:
    """Return what puts a tensor's rows into the target's order."""
    is_interleaved, head_dim = stored.config.rope_interleaved, stored.config.head_dim
    if not rotates(name) or is_interleaved == (to == META):
        return None
    function = halves_first if is_interleaved else pairs_first
    return lambda rows: function(rows, head_dim)


def _float_dtype(tensor: StoredTensor, options: Options) -> np.dtype:
    return tensor.float_dtype if options.dtype == "auto" else numpy_dtype(options.dtype)


def _floats(stored: StoredModel, name: str, tensor: StoredTensor, options: Options) -> np.ndarray:
    """Return the tensor in the target's dtype and row order."""
    dtype, reorder = _float_dtype(tensor, options), _order(stored, name, options.to)
    if tensor.is_float and ENCODINGS[tensor.encoding] == dtype:
        array = tensor.view()
    else:
        array = convert_tensor(tensor, dtype, Counter(0, None))
    return array if reorder is None else reorder(array)


def _entry(
    stored: StoredModel,
    name: str,
    tensor: StoredTensor,
    options: Options,
    entry_name: str,
    cut: Reorder | None = None,
    shape: tuple[int, ...] | None = None,
) -> Entry:
    """Return the entry of a float tensor, or of the piece of it that `cut` takes."""

    def read() -> np.ndarray:
        array = _floats(stored, name, tensor, options)
        piece = array if cut is None else cut(array)
        return np.ascontiguousarray(piece).reshape(-1).view(np.uint8)

    dtype, shape = _float_dtype(tensor, options), shape or tensor.shape
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return Entry(entry_name, FLOATS[dtype.name].encoding, shape, num_bytes, read)


def _quantized_plan(
    stored: StoredModel, tensors: Mapping[str, StoredTensor], options: Options
) -> Plan:
    """Put padded quantised tensors first, so that they begin at cache lines, then floats."""
    made_from, kind = sources(tensors), options.quantization

    def packed(name: str, tensor: StoredTensor) -> Entry:
        num_bytes, order = padded_bytes(kind, tensor.shape), _order(stored, name, options.to)
        return Entry(
            name,
            "U8",
            (num_bytes,),
            num_bytes,
            lambda: quantize_tensor(tensor, kind, order).payload.reshape(-1),
        )

    quantised = [packed(name, t) for name, t in made_from.items() if is_quantized(name)]
    floats = [
        _entry(stored, name, t, options, name)
        for name, t in made_from.items()
        if not is_quantized(name)
    ]
    floats.sort(key=lambda entry: -ENCODINGS[entry.dtype].itemsize)
    shapes = {name: t.shape for name, t in made_from.items() if is_quantized(name)}
    layout = SafetensorsLayout(quantised + floats, file_metadata(shapes, kind))
    config = _hf_config(stored, tensors, options)
    config |= {"tie_word_embeddings": False, "quantization_config": config_section(kind)}
    return Plan({"model.safetensors": layout}, made_from, {"config.json": config})


def _meta_plan(stored: StoredModel, tensors: Mapping[str, StoredTensor], options: Options) -> Plan:
    params, count = params_of(stored.config), options.shards
    _check_cuts(stored, count)
    made_from = sources(tensors)  # Meta's layout does not support tied heads
    entries: list[list[Entry]] = [[] for _ in range(count)]
    for name, tensor in made_from.items():
        theirs, axis = meta_name(name)
        for i, shard in enumerate(entries):
            cut = None if axis is None else _cut(axis, i, count)
            shape = tuple(n // count if a == axis else n for a, n in enumerate(tensor.shape))
            shard.append(_entry(stored, name, tensor, options, theirs, cut, shape))
    files = {
        f"consolidated.{i:02}.pth": PthLayout(shard, f"consolidated.{i:02}")
        for i, shard in enumerate(entries)
    }
    behind = {meta_name(name)[0]: tensor for name, tensor in made_from.items()}
    return Plan(files, behind, {PARAMS: params})


def _cut(axis: int, i: int, count: int) -> Reorder:
    def cut(array: np.ndarray) -> np.ndarray:
        step = array.shape[axis] // count
        piece = slice(i * step, (i + 1) * step)
        return array[:, piece] if axis == COLUMNS else array[piece]

    return cut


def _check_cuts(stored: StoredModel, count: int) -> None:
    config = stored.config
    sizes = {
        "n_kv_heads": config.n_kv_heads,
        "n_heads": config.n_heads,
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size % count]
    if odd or count > MAX_SHARDS:
        raise ValueError(
            f"{count} shards are not possible: at most {MAX_SHARDS} of equal size, and this "
            "model has " + (", ".join(odd) or "enough for fewer")
        )


def write_texts(plan: Plan, folder: Path, write: Callable[[Path, bytes], None]) -> None:
    """Write the JSON files of a plan, in its order."""
    for name, values in plan.texts.items():
        write(folder / name, json.dumps(values, indent=2).encode() + b"\n")
