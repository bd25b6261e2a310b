"""From stored tensors to the weights a model computes with: matching and conversion."""

import collections
from collections.abc import Mapping

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint.finiteness import check_range
from codellama_rt.checkpoint.quantize import QUANTIZATIONS, is_quantized, quantize_tensor, sources
from codellama_rt.checkpoint.stored_tensor import (
    Counter,
    Progress,
    StoredModel,
    StoredTensor,
    Weight,
)
from codellama_rt.checkpoint.tensor_names import EMBEDDING, HEAD, expected_shapes, is_recomputed
from codellama_rt.checkpoint.weight_memory import WeightMemory
from codellama_rt.errors import CheckpointError
from codellama_rt.ops.dtypes import ENCODINGS, numpy_dtype
from codellama_rt.ops.quantized import GGUF_BLOCKS

# Matrices are copied into huge pages if they have no more bytes together: SmolLM2-135M in bfloat16
# then decodes 1.06 times as fast (AMD EPYC, family 25 model 17), and takes 0.1 s longer to open.
# Larger models gain less, and would lie in memory twice: as a cached file and as a copy.
_COPIED_BYTES = 2**30
_CHUNK_BYTES = 2**20  # stays in a core's second-level cache between the passes over it


def match_tensors(model: StoredModel) -> dict[str, StoredTensor]:
    """Pick the tensors the model needs and reject a file that contains others.

    A tied model may carry `lm_head.weight`, which transformers ignores, too; so may old files carry
    rotary tables, which follow from the configuration.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not of floats.
    """
    shapes = expected_shapes(model.config)
    missing = [model.name_in_file(name) for name in shapes if name not in model.tensors]
    if missing:
        raise CheckpointError(
            f"{model.path}: tensor {missing[0]!r}: expected {len(shapes)} tensors, found none of "
            "that name" + _and_others(missing, "missing")
        )
    extra = [
        t.name for name, t in model.tensors.items() if name not in shapes and not _is_harmless(name)
    ]
    if extra:
        raise CheckpointError(
            f"{model.tensors.get(extra[0], next(iter(model.tensors.values()))).file}: tensor "
            f"{extra[0]!r}: "
            f"expected only the tensors of a Llama of {model.config.n_layers} layers, found this "
            "one" + _and_others(extra, "unknown")
        )
    for name, shape in shapes.items():
        _check_tensor(model.tensors[name], shape)
    return {name: model.tensors[name] for name in shapes}


def _is_harmless(name: str) -> bool:
    return name == HEAD or is_recomputed(name)


def _and_others(names: list[str], what: str) -> str:
    if len(names) == 1:
        return ""
    more = ", ".join(map(repr, names[1:4])) + (", ..." if len(names) > 4 else "")
    return f"; {len(names)} are {what}: also {more}"


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected shape {shape}, found {tensor.shape}"
        )
    if type(tensor) is StoredTensor and not tensor.is_float:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected dtype {', '.join(ENCODINGS)}, "
            f"found {tensor.encoding}"
        )


def choose_dtype(tensors: Mapping[str, StoredTensor]) -> np.dtype:
    """Chooses the dtype of the floats for dtype="auto".

    Args:
        tensors: as `match_tensors` returns them.

    Returns:
        The dtype most of the projections' elements are stored in. If any is quantised: bfloat16,
        or the embedding's in what `convert` wrote, which is that of the model it was made from.
    """
    projections = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
    if any(tensor.weight_dtype in QUANTIZATIONS for tensor in projections):
        return tensors[EMBEDDING].float_dtype
    elements: collections.Counter[np.dtype] = collections.Counter()
    for tensor in projections:
        if tensor.float_dtype is None:
            return numpy_dtype("bfloat16")
        elements[tensor.float_dtype] += tensor.size
    return elements.most_common(1)[0][0]


def load_arrays(
    tensors: Mapping[str, StoredTensor],
    target: np.dtype,
    *,
    is_auto: bool,
    quantization: str | None = None,
    repack: bool = False,
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """Turn stored tensors into weights, one after another.

    Args:
        tensors: as `match_tensors` returns them.
        target: dtype of the floats.
        is_auto: keep what is stored (norms each in their own dtype) and copy nothing but what
            differs from the projections' dtype or is in blocks that no operator takes; otherwise
            convert every tensor, those that `convert` quantised apart.
        quantization: "int8" or "int4" quantises the projections and the head.
        repack: copy the blocks that every step reads into the kernels' order (`ops.repack`), and
            all others of a small model into huge pages.
        progress: called with bytes done, bytes to read, and what is done.

    Returns:
        The weights by name; where target and file agree they are views of the file's mapping.

    Raises:
        CheckpointError: a finite value is beyond the range of target, or one to quantise is not
            finite.
    """
    todo = dict(tensors) if quantization is None else sources(tensors)
    kept = used_as_stored(todo, target, is_auto, quantization)
    tiled = repacked(todo, kept) if repack else set()
    moved = copied(todo, kept) if repack else set()
    made = [t for n, t in todo.items() if n not in kept or n in tiled | moved or t.is_repacked]
    counter = Counter(sum(t.num_bytes for t in made), progress)
    weights: dict[str, Weight] = {}
    mapped = used_in_place(todo, kept, tiled | moved)
    memory = WeightMemory()
    for name, tensor in todo.items():
        if name in mapped:
            weights[name] = tensor.view()
        elif name in tiled or (name in kept and tensor.is_repacked):
            weight = tensor.view()
            weights[name] = memory.keep(ops.repack(weight) if name in tiled else weight)
            counter.add(tensor.num_bytes, f"repacking {tensor.encoding}")
            tensor.release()
        elif name in kept:
            weights[name] = memory.copy(tensor.view())
            if name in moved:
                counter.add(tensor.num_bytes, "copying weights")
                tensor.release()
        elif quantization is not None and is_quantized(name):
            weights[name] = memory.keep(quantize_tensor(tensor, quantization))
            counter.add(tensor.num_bytes, f"quantising to {quantization}")
        else:
            weights[name] = memory.keep(convert_tensor(tensor, target, counter))
            tensor.release()
    if len(mapped) < len(todo):
        for tensor in {tensor.file: tensor for tensor in todo.values()}.values():
            tensor.release_file()
    return weights


def used_as_stored(
    tensors: Mapping[str, StoredTensor], target: np.dtype, is_auto: bool, quantization: str | None
) -> set[str]:
    """Names of the tensors that are used without conversion."""
    is_mixed = quantization is not None or not all(
        tensor.float_dtype is not None for name, tensor in tensors.items() if is_quantized(name)
    )

    def lies_right(name: str, tensor: StoredTensor) -> bool:
        if tensor.weight_dtype in QUANTIZATIONS:
            return True
        if tensor.is_repacked:
            return is_auto and quantization is None
        if not tensor.is_whole:
            return False
        if quantization is not None and is_quantized(name):
            return False
        if not tensor.is_float:
            return is_auto and tensor.weight_dtype is not None
        keeps_its_own = is_auto and (is_mixed or len(tensor.shape) == 1)
        return keeps_its_own or ENCODINGS[tensor.encoding] == target

    return {name for name, tensor in tensors.items() if lies_right(name, tensor)}


def repacked(tensors: Mapping[str, StoredTensor], kept: set[str]) -> set[str]:
    """Those of the tensors used as stored whose blocks can be repacked, and are worth it.

    An embedding is left where it lies, unless it is the head as well: a step reads few of its rows.
    """
    every_step = read_every_step(tensors, kept)
    return {name for name in every_step if tensors[name].weight_dtype in GGUF_BLOCKS}


def copied(tensors: Mapping[str, StoredTensor], kept: set[str]) -> set[str]:
    """Those of the tensors used as stored that are copied into huge pages: a small model's."""
    names = {
        name
        for name in read_every_step(tensors, kept) - repacked(tensors, kept)
        if not tensors[name].is_repacked
    }
    return names if sum(tensors[name].num_bytes for name in names) <= _COPIED_BYTES else set()


def read_every_step(tensors: Mapping[str, StoredTensor], kept: set[str]) -> set[str]:
    """Those of the matrices used as stored that every step reads: all but an embedding alone."""
    return {
        name for name in kept if is_quantized(name) or (name == EMBEDDING and HEAD not in tensors)
    }


def used_in_place(tensors: Mapping[str, StoredTensor], kept: set[str], moved: set[str]) -> set[str]:
    """Those of the tensors used as stored that stay in the file's mapping; `moved` do not.

    Where others of a file are made anew, its vectors are copied: a page that is touched brings its
    neighbours, up to 2 MB of them, into the process, and the norms lie all over the file.
    """
    made = moved | {name for name in kept if tensors[name].is_repacked}
    if len(kept) == len(tensors) and not made:
        return kept
    return {name for name in kept - made if len(tensors[name].shape) > 1}


def convert_tensor(tensor: StoredTensor, dtype: np.dtype, counter: Counter) -> np.ndarray:
    """Convert a chunk of rows at a time, so that a quantised tensor is never whole in float32."""
    converted = np.empty(tensor.shape, dtype)
    n_rows = tensor.shape[0]
    step = max(1, _CHUNK_BYTES // (tensor.size // n_rows * 4))
    done, what = 0, f"converting to {dtype.name}" if tensor.is_whole else "joining shards"
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        source = tensor.decode(begin, end)
        with np.errstate(over="ignore"):  # looked for below
            converted[begin:end] = source
        check_range(tensor, source, converted[begin:end], begin)
        counter.add(tensor.num_bytes * end // n_rows - done, what)
        done = tensor.num_bytes * end // n_rows
    converted.flags.writeable = False
    return converted
