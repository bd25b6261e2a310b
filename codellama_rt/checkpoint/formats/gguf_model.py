"""Llama models in GGUF files: metadata to ModelConfig, tensor names to Hugging Face's.

llama.cpp stores the rows of q and k so that the pairs (2i, 2i + 1) of a head rotate together. They
are used in that order: the configuration says so by `rope_interleaved`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.finiteness import first_non_finite
from codellama_rt.checkpoint.formats.gguf_file import GgufFile
from codellama_rt.checkpoint.formats.gguf_parts import read_gguf_parts
from codellama_rt.checkpoint.stored_tensor import StoredModel, StoredTensor
from codellama_rt.checkpoint.tensor_names import gguf_name, names_in_gguf
from codellama_rt.errors import CheckpointError, warn_of_checkpoint
from codellama_rt.model.config import (
    ATTENTION_BIASES,
    MAX_DIM,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_DIM,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    MLP_BIASES,
    ModelConfig,
    RopeScaling,
    check_consistency,
)
from codellama_rt.model.config_fields import ConfigFields

_FACTORS = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # of longrope


def read_gguf_model(path: Path) -> StoredModel:
    """Open a GGUF file of architecture "llama".

    Args:
        path: the file; of a model in several files any part.

    Returns:
        The model; no weight has been read.

    Raises:
        CheckpointError: `read_gguf_parts` rejects the file, or it has another architecture, or
            metadata that is missing, out of range or not supported.
    """
    file = read_gguf_parts(path)
    config = config_from_gguf(file)
    names = names_in_gguf(config.n_layers)
    tensors = {
        names.get(name, name): tensor
        for name, tensor in file.tensors.items()
        if name not in (_FACTORS, _SHORT, _LONG)
    }
    return StoredModel(file.path, config, tensors, {}, gguf_name, metadata=file.metadata)


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Build the model's configuration from the metadata of a GGUF file.

    Raises:
        CheckpointError: as for `read_gguf_model`.
    """
    fields = ConfigFields(_plain(file.metadata), str(file.path))
    if fields.values.get("general.architecture") != "llama":
        raise fields.fault("general.architecture", "'llama'", "no other architecture is supported")
    if fields.integer("llama.expert_count", 0, low=0, high=65535):
        raise fields.fault("llama.expert_count", "0", "mixtures of experts are not supported")
    n_heads = fields.integer("llama.attention.head_count", high=MAX_HEADS)
    dim = fields.integer("llama.embedding_length", high=MAX_DIM)
    head_dim = _head_dim(fields, dim, n_heads)
    positions = fields.integer("llama.context_length", high=MAX_POSITIONS)
    vocab_size = _vocab_size(file, fields)
    ends = [
        fields.token_ids(f"tokenizer.ggml.{kind}_token_id", vocab_size=vocab_size)
        for kind in ("eos", "eot")
    ]
    config = ModelConfig(
        n_layers=fields.integer("llama.block_count", high=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=fields.integer("llama.attention.head_count_kv", n_heads, high=MAX_HEADS),
        head_dim=head_dim,
        dim=dim,
        hidden_dim=fields.integer("llama.feed_forward_length", high=MAX_HIDDEN_DIM),
        vocab_size=vocab_size,
        rope_theta=fields.number("llama.rope.freq_base", 10000.0, above=1.0),
        norm_eps=_short_decimal(fields.number("llama.attention.layer_norm_rms_epsilon")),
        max_position_embeddings=positions,
        tie_word_embeddings="output.weight" not in file.tensors,
        rope_scaling=_rope_scaling(file, fields, positions, head_dim),
        bos_token_id=fields.token_id("tokenizer.ggml.bos_token_id", vocab_size=vocab_size),
        eos_token_ids=tuple(dict.fromkeys(sum(ends, ()))),
        biased=_biased(file),
        rope_interleaved=True,
    )
    check_consistency(config, str(file.path))
    return config


def _biased(file: GgufFile) -> tuple[str, ...]:
    """Return the projections with a bias: those that the first layer has."""
    names = {f"self_attn.{field}": field for field in ATTENTION_BIASES}
    names |= {f"mlp.{field}": field for field in MLP_BIASES}
    return tuple(
        field
        for module, field in names.items()
        if gguf_name(f"model.layers.0.{module}.bias") in file.tensors
    )


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Replace per-layer arrays of one repeated number by that number."""
    plain = dict(metadata)
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = metadata.get(f"llama.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            plain[f"llama.{key}"] = value[0].item()
    return plain


def _short_decimal(value: float) -> float:
    """Undo the rounding of e.g. 1e-5 to float32: the shortest decimal that rounds to the same."""
    return float(str(np.float32(value)))


def _head_dim(fields: ConfigFields, dim: int, n_heads: int) -> int:
    implied = dim // n_heads if dim % n_heads == 0 else None
    head_dim = fields.integer("llama.attention.key_length", implied, high=MAX_HEAD_DIM)
    if head_dim is None or head_dim > MAX_HEAD_DIM:
        raise fields.fault(
            "llama.embedding_length", f"a multiple of the {n_heads} heads, or key_length given"
        )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(key, head_dim, high=MAX_HEAD_DIM) != head_dim:
            raise fields.fault(key, f"the size of a head ({head_dim})")
    return head_dim


def _vocab_size(file: GgufFile, fields: ConfigFields) -> int:
    """Return the rows of the embedding, which decide; warn where the metadata say otherwise."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{file.path}: expected tensor 'token_embd.weight', found no such tensor"
        )
    size = embedding.shape[0]
    if size > MAX_VOCAB_SIZE:
        raise CheckpointError(
            f"{file.path}: tensor 'token_embd.weight': expected at most {MAX_VOCAB_SIZE} rows, "
            f"found {size}"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    said = {
        "llama.vocab_size": fields.integer("llama.vocab_size", None, low=-(2**63), high=2**64),
        "tokenizer.ggml.tokens": len(tokens) if isinstance(tokens, list) else None,
    }
    for key, value in said.items():
        if value not in (None, size):
            warn_of_checkpoint(
                f"{file.path}: {key}: expected {size}, the rows of the embedding, which are used; "
                f"found {value!r:.100}"
            )
    return size


def _rope_scaling(
    file: GgufFile, fields: ConfigFields, positions: int, head_dim: int
) -> RopeScaling | None:
    prefix = "llama.rope.scaling."
    kind = fields.values.get(prefix + "type", "linear")
    factor = (
        _unless_zero(fields, prefix + "factor")
        or _unless_zero(fields, "llama.rope.scale_linear")
        or 1.0
    )
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise fields.fault(prefix + "type", "one of none, linear, yarn, longrope")
    if kind == "longrope" or _LONG in file.tensors:
        return _longrope(file, fields, prefix, positions, head_dim)
    scaling = None
    if kind == "yarn":
        scaling = _yarn(fields, prefix, factor, positions)
    elif kind == "linear" and factor != 1.0:
        scaling = RopeScaling("linear", factor)
    if _FACTORS not in file.tensors:
        return scaling
    if scaling is not None:
        raise CheckpointError(
            f"{file.path}: tensor {_FACTORS!r}: expected none beside rope scaling "
            f"{scaling.kind!r}, found one"
        )
    return RopeScaling(
        "factors", 1.0, frequency_factors=_read_factors(file.tensors[_FACTORS], head_dim)
    )


def _yarn(fields: ConfigFields, prefix: str, factor: float, positions: int) -> RopeScaling:
    if fields.number(prefix + "yarn_ext_factor", 1.0, above=-2.0) not in (1.0, -1.0):  # -1: default
        raise fields.fault(prefix + "yarn_ext_factor", "1")
    if fields.values.get(prefix + "yarn_log_multiplier"):
        raise fields.fault(prefix + "yarn_log_multiplier", "0")
    weight = fields.number(prefix + "attn_factor", 1.0) * fields.number(
        prefix + "yarn_attn_factor", 1.0
    )
    return RopeScaling(
        "yarn",
        factor,
        fields.integer(prefix + "original_context_length", positions, high=MAX_POSITIONS),
        beta_fast=_unless_zero(fields, prefix + "yarn_beta_fast") or 32.0,
        beta_slow=_unless_zero(fields, prefix + "yarn_beta_slow") or 1.0,
        attention_factor=None if weight == 1.0 else weight * (0.1 * math.log(factor) + 1.0),
    )


def _longrope(
    file: GgufFile, fields: ConfigFields, prefix: str, positions: int, head_dim: int
) -> RopeScaling:
    factors = {}
    for name in (_SHORT, _LONG):
        if name not in file.tensors:
            raise CheckpointError(
                f"{file.path}: tensor {name!r}: expected it for longrope, found none"
            )
        factors[name] = _read_factors(file.tensors[name], head_dim)
    original = fields.integer(prefix + "original_context_length", positions, high=MAX_POSITIONS)
    return RopeScaling(
        "longrope",
        positions / original,
        original,
        attention_factor=fields.number(prefix + "attn_factor", 1.0),
        frequency_factors=factors[_SHORT],
        long_factors=factors[_LONG],
    )


def _unless_zero(fields: ConfigFields, key: str) -> float | None:
    return fields.number(key, None) if fields.values.get(key) else None


def _read_factors(tensor: StoredTensor, head_dim: int) -> tuple[float, ...]:
    """Read frequency divisors: the tensors whose values are part of the configuration."""
    if tensor.encoding != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected F32 ({head_dim // 2},), "
            f"found {tensor.encoding} {tensor.shape}"
        )
    factors = tensor.view()
    if first_non_finite(factors) is not None or not (factors > 0).all():
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r}: expected finite factors above 0"
        )
    return tuple(factors.tolist())
