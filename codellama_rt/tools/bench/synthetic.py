"""Checkpoints of random weights in Code Llama's shapes, for measuring speed and memory.

    python -m codellama_rt.tools.bench.synthetic --shape 7b --layers 4 --out 7b-4l  # safetensors
    python -m codellama_rt.tools.bench.synthetic --shape 7b --layers 4 --out 7b-4l.gguf  # the same

A weight depends on its name, the seed and its shape, so both forms contain the same model; in GGUF
the rows of q and k are in that format's order. The directory has no tokenizer unless one is given;
the GGUF file gets a vocabulary of invented words, because llama.cpp needs one to open it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint.formats.packed_weights import (
    config_section,
    file_metadata,
    padded_bytes,
)
from codellama_rt.checkpoint.formats.safetensors import write_safetensors
from codellama_rt.checkpoint.formats.tensor_file import Entry
from codellama_rt.checkpoint.quantize import QUANTIZATIONS, is_quantized
from codellama_rt.checkpoint.tensor_names import expected_shapes, gguf_name
from codellama_rt.llm.variants import SHAPES
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.dtypes import FLOAT_DTYPES, FLOATS, numpy_dtype
from codellama_rt.tools.bench.noise import noise

WEIGHTS = (*FLOAT_DTYPES, *QUANTIZATIONS)


def make_weight(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return ones for a norm, noise of variance 1 / in_features for a matrix."""
    if len(shape) == 1:
        return np.ones(shape, numpy_dtype(dtype))
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    return noise(shape, dtype, rng, (12 / shape[1]) ** 0.5)


def write_directory(
    folder: Path, config: ModelConfig, *, dtype: str = "bfloat16", seed: int = 0
) -> None:
    """Write config.json, generation_config.json and model.safetensors, one tensor at a time.

    Args:
        folder: created if it does not exist.
        config: of the model.
        dtype: of the weights; int8 and int4 are quantised while writing, in the format of
            `codellama_rt.tools.convert.convert`, with the embedding and the norms in bfloat16.
        seed: of the weights.
    """
    quantization = dtype if dtype in QUANTIZATIONS else None
    config = replace(config, dtype="bfloat16" if quantization else dtype)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _hf_config(config)
    shapes, metadata = expected_shapes(config), {}
    if quantization:
        settings["quantization_config"] = config_section(quantization)
        packed = {name: shape for name, shape in shapes.items() if is_quantized(name)}
        metadata = file_metadata(packed, quantization)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    entries = [
        _entry(name, shape, config.dtype, quantization, seed) for name, shape in shapes.items()
    ]
    write_safetensors(folder / "model.safetensors", entries, metadata, lambda entry: None)


def _entry(
    name: str, shape: tuple[int, ...], dtype: str, quantization: str | None, seed: int
) -> Entry:
    def read() -> np.ndarray:
        weight = make_weight(name, shape, dtype, seed)
        if quantization and is_quantized(name):
            return ops.quantize(weight, quantization).payload
        return weight.view(np.uint8).reshape(-1)

    if quantization and is_quantized(name):
        num_bytes = padded_bytes(quantization, shape)
        return Entry(name, "U8", (num_bytes,), num_bytes, read)
    num_bytes = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
    return Entry(name, FLOATS[dtype].encoding, shape, num_bytes, read)


def _hf_config(config: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": config.dtype,
    }


def write_gguf(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write the same model as one GGUF file with a vocabulary of invented words."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = kinds(FLOATS[config.dtype].ggml_type)
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config)
    for name, shape in expected_shapes(config).items():
        stored, item = (kind, numpy_dtype(config.dtype)) if len(shape) > 1 else (kinds.F32, "<f4")
        num_bytes = int(np.prod(shape)) * np.dtype(item).itemsize
        in_bytes = (*shape[:-1], shape[-1] * np.dtype(item).itemsize)
        writer.add_tensor_info(
            gguf_name(name), in_bytes, np.dtype(np.uint8), num_bytes, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in expected_shapes(config).items():
        values = make_weight(name, shape, config.dtype, seed)
        if name.endswith("q_proj.weight"):
            values = _interleave(values, config.n_heads)
        elif name.endswith("k_proj.weight"):
            values = _interleave(values, config.n_kv_heads)
        elif values.ndim == 1:
            values = values.astype(np.float32)
        writer.write_tensor_data(np.ascontiguousarray(values).view(np.uint8))
    writer.close()


def _write_metadata(writer: object, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    pieces += [(f"\u2581w{i}", normal) for i in range(len(pieces), config.vocab_size)]
    words, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder Hugging Face's rows (i, i + head_dim / 2 rotate together) to GGUF's (2i, 2i + 1)."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.transpose(0, 2, 1, 3).reshape(rows.shape)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="number of layers (default: the full model's)")
    parser.add_argument(
        "--dtype", choices=WEIGHTS, default="bfloat16", help="int8 and int4: only for a directory"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model to put into the directory")
    parser.add_argument("--out", type=Path, required=True, help="a directory, or a *.gguf file")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    config = replace(config, n_layers=args.layers or config.n_layers)
    if args.out.suffix == ".gguf":
        write_gguf(args.out, replace(config, dtype=args.dtype), args.seed)
        return
    write_directory(args.out, config, dtype=args.dtype, seed=args.seed)
    if args.tokenizer:
        shutil.copy(args.tokenizer, args.out / "tokenizer.model")


if __name__ == "__main__":
    main()
