"""Write a model as a Hugging Face directory: config.json and safetensors, sharded when large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codellama_rt.checkpoint.formats.safetensors import write_safetensors
from codellama_rt.checkpoint.formats.tensor_file import Entry
from codellama_rt.checkpoint.tensor_names import halves_first, named_weights, rotates
from codellama_rt.model.config import ATTENTION_BIASES, MLP_BIASES, ModelConfig, RopeScaling
from codellama_rt.ops.dtypes import FLOATS

if TYPE_CHECKING:
    from codellama_rt.model.weights import LlamaWeights

INDEX = "model.safetensors.index.json"
_SCALING_KEYS = {  # besides rope_type and factor, with transformers' names
    "linear": (),
    "dynamic": (),
    "yarn": (
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def write_directory(
    path: Path, config: ModelConfig, weights: LlamaWeights, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and the weights, one tensor at a time.

    Args:
        path: the directory, created if needed; config.json is written last, so that an
            incomplete model does not open.
        config: of the model; rows in GGUF's order are converted to Hugging Face's.
        weights: float arrays.
        max_shard_bytes: maximum bytes per file, unless one tensor is larger.

    Raises:
        ValueError: quantised weights, or a RoPE scaling that config.json cannot express.
        OSError: a file cannot be written.
    """
    values = hf_config(config)
    entries = [
        _entry(name, array, config) for name, array in named_weights(config, weights).items()
    ]
    stage = path / ".saving"  # the weights may be mapped from the files that are replaced
    stage.mkdir(parents=True)
    try:
        _write_weights(stage, split_shards(entries, max_shard_bytes))
        for old in [path / "config.json", *path.glob("*.safetensors"), path / INDEX]:
            old.unlink(missing_ok=True)
        for file in stage.iterdir():
            file.replace(path / file.name)
    finally:
        shutil.rmtree(stage)
    _write_json(path / "config.json", values)


def _write_weights(path: Path, shards: list[list[Entry]]) -> None:
    for i, shard in enumerate(shards):
        name = shard_name(i, len(shards))
        write_safetensors(path / name, shard, {"format": "pt"}, lambda entry: None)
    if len(shards) > 1:
        _write_json(path / INDEX, index_of(shards))


def shard_name(i: int, count: int) -> str:
    """Return the name of file i of `count`.

    Example:
        >>> shard_name(0, 2)
        'model-00001-of-00002.safetensors'
    """
    return "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"


def index_of(shards: list[list[Entry]]) -> dict[str, Any]:
    """Return the index of several files: which tensor is in which."""
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    files = {
        entry.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for entry in shard
    }
    return {"metadata": {"total_size": total}, "weight_map": files}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration with the keys of transformers' LlamaConfig.

    Raises:
        ValueError: a RoPE scaling that LlamaConfig does not support.
    """
    ends = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config.rope_scaling),
        "torch_dtype": config.dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        **_biases(config),
        **_original_length(config.rope_scaling),
    }


def _biases(config: ModelConfig) -> dict[str, bool]:
    flags = {"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES}
    said = {key: set(fields) <= set(config.biased) for key, fields in flags.items()}
    expressed = [field for key, fields in flags.items() if said[key] for field in fields]
    if set(expressed) != set(config.biased):
        raise ValueError(
            f"config.json cannot express biases of {', '.join(config.biased)} alone: all of "
            "attention have one or none, and so do those of the feed-forward layers"
        )
    return said


def _original_length(scaling: RopeScaling | None) -> dict[str, int]:
    """Return what longrope has beside its other keys."""
    if scaling is None or scaling.kind != "longrope":
        return {}
    return {"original_max_position_embeddings": scaling.original_max_position_embeddings}


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind not in (*_SCALING_KEYS, "longrope"):
        raise ValueError(
            f"rope scaling {scaling.kind!r} of a GGUF file is not supported by config.json"
        )
    if scaling.kind == "longrope":
        return {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "short_factor": list(scaling.frequency_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
        }
    values = {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.kind]}
    values = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **values}


def _entry(name: str, array: np.ndarray, config: ModelConfig) -> Entry:
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{name} is quantised ({array.dtype}), and only floats are supported; open the model "
            "with dtype='bfloat16'"
        )

    def read() -> np.ndarray:
        is_other = rotates(name) and config.rope_interleaved
        whole = halves_first(array, config.head_dim) if is_other else array
        return np.ascontiguousarray(whole).reshape(-1).view(np.uint8)

    return Entry(name, FLOATS[array.dtype.name].encoding, array.shape, array.nbytes, read)


def split_shards(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    """Split entries, in order, into files of at most `max_bytes` unless one tensor is larger."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.num_bytes for e in shards[-1]) + entry.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
