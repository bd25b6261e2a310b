"""Checkpoint files made by hand, well formed or not, and where the tiny golden ones lie."""

import json
import struct
from pathlib import Path

import numpy as np

from codellama_rt.checkpoint.tensor_names import expected_shapes, gguf_name
from codellama_rt.model.config import ModelConfig

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
TINY_NAMES = sorted(path.name for path in TINY.iterdir())

MINI_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SAFETENSORS_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
GGML_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "I32": 26,
    "F64": 28, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


def mini_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The float32 tensors of a model of MINI_CONFIG."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(ModelConfig.from_hf(MINI_CONFIG))
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def safetensors_header(tensors: dict[str, np.ndarray]) -> dict:
    header, end = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS_TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    return header


def join_safetensors(header: dict | bytes, payload: bytes) -> bytes:
    """Encodes a file; a header given as bytes is taken as it is, otherwise padded as writers do."""
    raw = header
    if not isinstance(raw, bytes):
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    payload = b"".join(array.tobytes() for array in tensors.values())
    return join_safetensors(safetensors_header(tensors), payload)


def write_mini(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    """Writes a whole checkpoint directory; keyword arguments replace keys of config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MINI_CONFIG | config))
    content = safetensors_bytes(mini_tensors() if tensors is None else tensors)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def write_sharded(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MINI_CONFIG))
    for file, tensors in shards.items():
        (folder / file).write_bytes(safetensors_bytes(tensors))
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def gguf_string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value) -> bytes:
    """Encodes a value with its type; lists become arrays of strings or float32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, bytes):
        return value  # already encoded, rightly or wrongly
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)


def gguf_bytes(
    metadata: dict, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], *, offsets=None
) -> bytes:
    """Encodes a GGUF file of tensors (type, shape, bytes); offsets replaces true offsets."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += gguf_string(key) + gguf_value(value)
    payload = b""
    for name, (kind, shape, raw) in tensors.items():
        offset = (offsets or {}).get(name, len(payload))
        header += gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", GGML_TYPES[kind], offset)
        payload += raw + bytes(-len(raw) % 32)
    return header + bytes(-len(header) % 32) + payload


def gguf_metadata(config: ModelConfig) -> dict:
    return {
        "general.architecture": "llama",
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
    }


def gguf_tensors(tensors: dict[str, np.ndarray], config: ModelConfig, encode=None) -> dict:
    """Tensors as llama.cpp stores them, rows of q and k interleaved; encode gives type, bytes."""
    stored = {}
    for name in expected_shapes(config):
        array = tensors[name]
        if "q_proj" in name or "k_proj" in name:
            halves = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        kind, raw = SAFETENSORS_TYPES[array.dtype.name], array.tobytes()
        if encode is not None:
            kind, raw = encode(name, array)
        stored[gguf_name(name)] = (kind, array.shape, raw)
    return stored


def mini_gguf() -> tuple[dict, dict]:
    """Metadata and tensors of the model of MINI_CONFIG."""
    config = ModelConfig.from_hf(MINI_CONFIG)
    return gguf_metadata(config), gguf_tensors(mini_tensors(), config)


def mini_gguf_bytes(**changes) -> bytes:
    """The mini model with metadata replaced (a key's dots are written __); ... removes a key."""
    metadata, tensors = mini_gguf()
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return gguf_bytes({k: v for k, v in metadata.items() if v is not ...}, tensors)
