"""Meta's own checkpoints: params.json, tokenizer.model and consolidated.00.pth, .01.pth, ...

Each file holds a part of every matrix, cut for model parallelism: wq, wk, wv, w1, w3 and output by
rows, wo, w2 and the embedding by columns; norms are in every file. Rows of q and k are in the order
in which the pairs (2i, 2i + 1) of a head rotate together, and are used in that order.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.mapped_files import MappedFile
from codellama_rt.checkpoint.stored_tensor import StoredModel, StoredTensor
from codellama_rt.checkpoint.tensor_names import COLUMNS, EMBEDDING, ROWS, meta_name, name_from_meta
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import (
    MAX_DIM,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_DIM,
    MAX_LAYERS,
    MAX_VOCAB_SIZE,
    ModelConfig,
    check_consistency,
)
from codellama_rt.model.config_fields import ConfigFields

PARAMS = "params.json"
MAX_SHARDS = 64
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_LONG_THETA = 1e6  # base of the models trained on 16,384 tokens; the others saw 4,096


def hidden_dim_of(dim: int, multiple_of: int, multiplier: float) -> int:
    """Compute the width of the feed-forward layers like Meta's model.py.

    Example:
        >>> hidden_dim_of(4096, 256, 1.0)
        11008
    """
    return multiple_of * -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of)


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """A matrix in several files, joined when it is used. `payload` is that of the first part."""

    parts: tuple[StoredTensor, ...] = ()
    axis: int = ROWS

    @property
    def is_whole(self) -> bool:
        """Always False: the matrix is in several parts."""
        return False

    @property
    def float_dtype(self) -> np.dtype | None:
        """That of the parts."""
        return self.parts[0].float_dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def view(self) -> np.ndarray:
        """Join the matrix anew and return it."""
        return self.decode(0, self.shape[0])

    def decode(self, begin: int, end: int) -> np.ndarray:
        """Return the rows begin..end, joined from the files that have parts of them."""
        if self.axis == COLUMNS:
            return np.concatenate([part.decode(begin, end) for part in self.parts], axis=COLUMNS)
        rows = self.parts[0].shape[0]
        pieces = [
            part.decode(max(begin - i * rows, 0), min(end - i * rows, rows))
            for i, part in enumerate(self.parts)
            if i * rows < end and begin < (i + 1) * rows
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def release(self) -> None:
        """Release the memory of all parts' mapped pages."""
        for part in self.parts:
            part.release()

    def mappings(self) -> list[MappedFile]:
        """Return the mappings of all parts' files."""
        return [mapping for part in self.parts for mapping in part.mappings()]


def is_meta_directory(path: Path) -> bool:
    """Return whether a directory is in Meta's layout, and not also in Hugging Face's.

    Example:
        >>> is_meta_directory(Path("."))
        False
    """
    if (path / "config.json").exists():
        return False
    return (path / PARAMS).exists() or any(path.glob("consolidated.*.pth"))


def read_meta_directory(path: Path) -> StoredModel:
    """Open a directory in Meta's layout.

    Args:
        path: a directory with params.json and consolidated.00.pth, .01.pth, ...

    Returns:
        The model; no weights have been read except the norms, and those only if there are shards.

    Raises:
        CheckpointError: a file is missing or rejected, or the shards do not fit together.
    """
    from codellama_rt.checkpoint.formats.pth import read_pth  # a machine that others never need

    shards = [read_pth(file) for file in _shard_files(path)]
    for shard in shards[1:]:
        if shard.keys() != shards[0].keys():
            odd = min(shard.keys() ^ shards[0].keys())
            raise CheckpointError(f"{path}: tensor {odd!r}: expected it in every shard, or in none")
    tensors = {
        name_from_meta(name): _join(path, name, [shard[name] for shard in shards])
        for name in shards[0]
        if name != "rope.freqs"  # follows from the configuration
    }
    config = config_from_params(path / PARAMS, _vocab_size(path, tensors))
    return StoredModel(path, config, tensors, {}, lambda name: meta_name(name)[0])


def _shard_files(path: Path) -> list[Path]:
    files = sorted(path.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if not files or len(files) > MAX_SHARDS or [file.name for file in files] != expected:
        raise CheckpointError(
            f"{path}: expected consolidated.00.pth, consolidated.01.pth, ... without a gap, found "
            f"{', '.join(file.name for file in files[:8]) or 'none'}"
        )
    return files


def _join(path: Path, name: str, parts: list[StoredTensor]) -> StoredTensor:
    first = parts[0]
    if len(parts) == 1:
        return first
    if any((part.shape, part.encoding) != (first.shape, first.encoding) for part in parts):
        raise CheckpointError(f"{path}: tensor {name!r}: expected parts of one shape and dtype")
    hf_name = name_from_meta(name)
    axis = meta_name(hf_name)[1] if hf_name != name else None
    if axis is None:
        if any(not np.array_equal(part.payload, first.payload) for part in parts[1:]):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected the same in every shard, found different ones"
            )
        return first
    if len(first.shape) != 2:
        raise CheckpointError(f"{path}: tensor {name!r}: expected a matrix, found {first.shape}")
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))
    return ShardedTensor(name, first.file, first.encoding, shape, first.payload, tuple(parts), axis)


def _vocab_size(path: Path, tensors: dict[str, StoredTensor]) -> int:
    """Return the rows of the embedding: params.json has no vocab_size, or -1."""
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: expected a matrix 'tok_embeddings.weight', found none")
    return embedding.shape[0]


def config_from_params(file: Path, vocab_size: int) -> ModelConfig:
    """Build the model's configuration from params.json.

    Args:
        file: params.json.
        vocab_size: rows of the embedding; the file does not state it.

    Raises:
        CheckpointError: a value is missing, out of range or contradicts another one.
    """
    fields = ConfigFields(read_object(file), str(file))
    n_heads = fields.integer("n_heads", high=MAX_HEADS)
    dim = fields.integer("dim", high=MAX_DIM)
    if dim % n_heads or dim // n_heads > MAX_HEAD_DIM:
        raise fields.fault("dim", f"a multiple of n_heads ({n_heads})")
    if vocab_size > MAX_VOCAB_SIZE:
        raise CheckpointError(f"{file}: expected at most {MAX_VOCAB_SIZE} tokens, got {vocab_size}")
    theta = fields.number("rope_theta", 10000.0, above=1.0)
    config = ModelConfig(
        n_layers=fields.integer("n_layers", high=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=fields.integer("n_kv_heads", n_heads, high=MAX_HEADS),
        head_dim=dim // n_heads,
        dim=dim,
        hidden_dim=_hidden_dim(fields, dim),
        vocab_size=vocab_size,
        rope_theta=theta,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope_interleaved=True,
        max_position_embeddings=16384 if theta >= _LONG_THETA else 4096,
    )
    check_consistency(config, str(file))
    return config


def _hidden_dim(fields: ConfigFields, dim: int) -> int:
    multiple_of = fields.integer("multiple_of", 256, high=MAX_HIDDEN_DIM)
    multiplier = fields.number("ffn_dim_multiplier", 1.0)
    if multiplier > 64 or hidden_dim_of(dim, multiple_of, multiplier) > MAX_HIDDEN_DIM:
        raise fields.fault("ffn_dim_multiplier", f"layers of at most {MAX_HIDDEN_DIM}")
    return hidden_dim_of(dim, multiple_of, multiplier)


def params_of(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of params.json for a model.

    Raises:
        ValueError: Meta's code does not support something in the configuration.

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=32, n_kv_heads=32, head_dim=128, dim=4096,
        ...                      hidden_dim=11008, vocab_size=32016)
        >>> params_of(config)["multiple_of"]
        256
    """
    is_other = config.head_dim * config.n_heads != config.dim
    if config.rope_scaling is not None or is_other or config.biased:
        raise ValueError(
            "params.json does not support RoPE scaling, biases, or heads other than dim / n_heads: "
            "this model cannot be written in Meta's layout"
        )
    multiple_of, multiplier = _feed_forward(config.dim, config.hidden_dim)
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }


def _feed_forward(dim: int, hidden_dim: int) -> tuple[int, float]:
    """Return the multiple and multiplier that give `hidden_dim`: Meta's own if they do."""
    for multiple_of, multiplier in ((256, 1.0), (4096, 1.3), (16, 1.0), (16, 1.3)):
        if hidden_dim_of(dim, multiple_of, multiplier) == hidden_dim:
            return multiple_of, multiplier
    multiple_of = math.gcd(hidden_dim, 256)
    # Aim at the middle of the range that rounds up to hidden_dim.
    multiplier = (hidden_dim - (multiple_of - 1) / 2) / int(2 * 4 * dim / 3)
    assert hidden_dim_of(dim, multiple_of, multiplier) == hidden_dim
    return multiple_of, multiplier
