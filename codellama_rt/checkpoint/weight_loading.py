"""From stored tensors to the arrays a model computes with: matching, conversion, finiteness."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from codellama_rt.checkpoint.stored_tensor import ENCODINGS, StoredModel, StoredTensor
from codellama_rt.config import ModelConfig
from codellama_rt.dtypes import numpy_dtype
from codellama_rt.errors import CheckpointError

Progress = Callable[[int, int, str], None]  # done bytes, total bytes, what is being done

_CHUNK_BYTES = 2**20  # stays in a core's second-level cache between the passes over it
_EXPONENT_BITS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Lists the tensors of a model by Hugging Face's names; weights of projections are (out, in).

    Args:
        config: the model.

    Returns:
        Name to shape, embedding first, in the order a token passes through the model.

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, dim=64,
        ...                      hidden_dim=176, vocab_size=512)
        >>> expected_shapes(config)["model.layers.0.self_attn.k_proj.weight"]
        (32, 64)
    """
    dim, hidden_dim = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (q_dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, q_dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden_dim, dim),
        "mlp.up_proj": (hidden_dim, dim),
        "mlp.down_proj": (dim, hidden_dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes


def match_tensors(model: StoredModel) -> dict[str, StoredTensor]:
    """Picks the tensors the model needs and refuses a file that holds others.

    A tied model may carry `lm_head.weight`, which transformers ignores, too; so may old files carry
    `rotary_emb.inv_freq`, which follows from the configuration.

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
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


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
    """Chooses the dtype of the projections for dtype="auto".

    Args:
        tensors: as `match_tensors` returns them.

    Returns:
        The dtype most of the projections' elements are stored in; bfloat16 if any is quantised.
    """
    projections = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
    if not all(tensor.is_float for tensor in projections):
        return numpy_dtype("bfloat16")
    elements: Counter[str] = Counter()
    for tensor in projections:
        elements[tensor.encoding] += tensor.size
    return ENCODINGS[elements.most_common(1)[0][0]]


def load_arrays(
    tensors: Mapping[str, StoredTensor], dtype: str, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Turns stored tensors into arrays.

    Args:
        tensors: as `match_tensors` returns them.
        dtype: "auto" keeps what is stored (norms each in their own dtype) and copies nothing but
            what differs from the projections' dtype; a name converts every tensor.
        progress: called with bytes done, bytes to convert, and what is done.

    Returns:
        The arrays by name; where dtype and file agree they are views of the file's mapping.

    Raises:
        CheckpointError: a finite value is beyond the range of dtype.
    """
    target = choose_dtype(tensors) if dtype == "auto" else numpy_dtype(dtype)

    def lies_right(tensor: StoredTensor) -> bool:
        keeps_its_own = dtype == "auto" and len(tensor.shape) == 1
        return tensor.is_float and (keeps_its_own or ENCODINGS[tensor.encoding] == target)

    counter = _Counter(
        sum(t.payload.nbytes for t in tensors.values() if not lies_right(t)),
        f"converting to {target.name}",
        progress,
    )
    return {
        name: tensor.view() if lies_right(tensor) else _convert(tensor, target, counter)
        for name, tensor in tensors.items()
    }


class _Counter:
    def __init__(self, total: int, what: str, progress: Progress | None):
        self._done, self._total, self._what, self._progress = 0, total, what, progress

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, self._what)


def _convert(tensor: StoredTensor, dtype: np.dtype, counter: _Counter) -> np.ndarray:
    """Converts a chunk of rows at a time, so that a quantised tensor is never whole in float32."""
    converted = np.empty(tensor.shape, dtype)
    n_rows = tensor.shape[0]
    step = max(1, _CHUNK_BYTES // (tensor.size // n_rows * 4))
    done = 0
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        source = tensor.decode(begin, end)
        with np.errstate(over="ignore"):  # looked for below
            converted[begin:end] = source
        bad = first_non_finite(converted[begin:end])
        if bad is not None:
            _check_overflow(tensor, source, converted[begin:end], begin)
        counter.add(tensor.payload.nbytes * end // n_rows - done)
        done = tensor.payload.nbytes * end // n_rows
    converted.flags.writeable = False
    return converted


def _check_overflow(
    tensor: StoredTensor, source: np.ndarray, converted: np.ndarray, begin: int
) -> None:
    """Refuses values that were finite as stored; others are check="finite"'s concern."""
    with np.errstate(invalid="ignore"):
        overflowed = np.isfinite(source.astype(np.float32)) & ~np.isfinite(
            converted.astype(np.float32)
        )
    if overflowed.any():
        place = tuple(int(i) for i in np.argwhere(overflowed)[0])
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected values in the range of "
            f"{converted.dtype.name}, "
            f"found {float(source[place]):g} at {[place[0] + begin, *place[1:]]}; use "
            "dtype='float32' or 'bfloat16'"
        )


def first_non_finite(array: np.ndarray) -> int | None:
    """Finds the first NaN or infinity.

    Args:
        array: float32, float16 or bfloat16, contiguous.

    Returns:
        Its index in the flattened array, or None.

    Example:
        >>> first_non_finite(np.array([1.0, np.nan], np.float16))
        1
    """
    # All exponent bits set means NaN or infinity; without its sign such a pattern is the greatest,
    # so one masked maximum answers: 20 GB/s a core, where np.isfinite does 1 to 2 in 16 bits.
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    limit = unsigned.type(_EXPONENT_BITS[array.dtype.name])
    magnitudes = array.reshape(-1).view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
    if not magnitudes.size or magnitudes.max() < limit:
        return None
    return int(np.argmax(magnitudes >= limit))


def check_finite(
    tensors: Mapping[str, StoredTensor],
    arrays: Mapping[str, np.ndarray],
    progress: Progress | None = None,
) -> None:
    """Reads every weight once and refuses NaN and infinities.

    Args:
        tensors: where the arrays come from, for the message.
        arrays: the arrays by the same names.
        progress: called with bytes done, bytes in all, and what is done.

    Raises:
        CheckpointError: a value is not finite.
    """
    counter = _Counter(sum(array.nbytes for array in arrays.values()), "checking for NaN", progress)
    for name, array in arrays.items():
        flat = array.reshape(-1)
        step = _CHUNK_BYTES // array.dtype.itemsize
        for begin in range(0, flat.size, step):
            chunk = flat[begin : begin + step]
            bad = first_non_finite(chunk)
            if bad is not None:
                place = [int(i) for i in np.unravel_index(begin + bad, array.shape)]
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {tensors[name].name!r}: expected finite values, "
                    f"found {float(chunk[bad])} at {place}"
                )
            counter.add(chunk.nbytes)
