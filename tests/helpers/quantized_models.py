"""Models with quantised weights, what their parts are, and how much of their files is resident."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from codellama_rt.checkpoint import LlamaWeights, open_checkpoint
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.stored_tensor import Weight
from codellama_rt.checkpoint.tensor_names import expected_shapes, gguf_name
from codellama_rt.model.config import ModelConfig
from codellama_rt.ops.quantized import GGUF_BLOCKS, GGUF_HALVES
from helpers.checkpoint_files import (
    MINI_CONFIG,
    TINY,
    gguf_bytes,
    gguf_metadata,
    gguf_tensors,
    write_mini,
)

BLOCK_CONFIG = ModelConfig(  # K-quants have blocks of 256
    n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, dim=256, hidden_dim=512, vocab_size=300,
    max_position_embeddings=256, rope_interleaved=True,
)  # fmt: skip
_SCALES = {  # how large a block's float16 scales and minima are
    "Q4_0": [1e-2], "Q4_1": [1e-2, -7.5e-2], "Q5_0": [5e-3], "Q5_1": [5e-3, -7.75e-2],
    "Q8_0": [1e-3], "IQ4_NL": [8e-4], "Q2_K": [6e-3, 9e-3], "Q3_K": [1e-3], "Q4_K": [4e-4, 3e-3],
    "Q5_K": [1e-4, 1.55e-3], "Q6_K": [6e-5],
}  # fmt: skip


def projections(weights: LlamaWeights) -> Iterator[Weight]:
    yield weights.lm_head
    for layer in weights.layers:
        yield from (value for name, value in vars(layer).items() if name.endswith("_proj"))


def floats(weights: LlamaWeights) -> Iterator[np.ndarray]:
    yield from (weights.embedding, weights.norm)
    for layer in weights.layers:
        yield from (layer.attention_norm, layer.mlp_norm)


def mapping_under(array):
    """Follows a view to the file's mapping that it looks into; None: memory without a file."""
    while isinstance(array, np.ndarray):
        array = array.base
    mapping = array.obj if isinstance(array, memoryview) else array
    try:
        return mapping if mapping is None or mapping.size() else None
    except (OSError, ValueError):  # anonymous: huge pages
        return None


def large_model(folder: Path) -> Path:
    """A checkpoint of 22 MB: of a size to see in the process's memory."""
    shapes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2000}
    rng = np.random.default_rng(0)
    wanted = expected_shapes(ModelConfig.from_hf(MINI_CONFIG | shapes))
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in wanted.items()}
    return write_mini(folder, tensors, **shapes)


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are mapped and resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split(" ", 1)[0]
        if not word.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and word == "Rss:":
            total += 1024 * int(line.split()[1])
    return total


def random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> bytes:
    """Blocks of one of GGUF's formats with small random scales and any values."""
    elements, num_bytes = GGUF_BLOCKS[kind.lower()]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // elements, num_bytes), np.uint8)
    for offset, size in zip(GGUF_HALVES[kind.lower()], _SCALES[kind], strict=True):
        scales = (size * rng.uniform(0.5, 1.0, (len(blocks), 1))).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.tobytes()


def block_model(
    path: Path, kinds: dict[str, str], *, tied: bool = False,
    given: dict[str, tuple[str, bytes]] | None = None,
) -> Path:  # fmt: skip
    """A GGUF file of BLOCK_CONFIG.

    Args:
        path: the file.
        kinds: type of each tensor by a part of its name in GGUF; the first that fits counts.
        tied: leave the head out.
        given: type and bytes of tensors, likewise, instead of random ones.
    """
    rng = np.random.default_rng(11)
    tensors = {}
    for name, shape in expected_shapes(BLOCK_CONFIG).items():
        ours = gguf_name(name)
        kind = next((kind for part, kind in kinds.items() if part in ours), "F32")
        if len(shape) == 1:
            kind, raw = "F32", rng.uniform(0.5, 1.5, shape).astype(np.float32).tobytes()
        elif kind in _SCALES:
            raw = random_blocks(rng, kind, shape)
        else:
            raw = (0.06 * rng.standard_normal(shape, np.float32)).tobytes()
        kind, raw = next((g for part, g in (given or {}).items() if part in ours), (kind, raw))
        if not (tied and ours == "output.weight"):
            tensors[ours] = (kind, shape, raw)
    path.write_bytes(gguf_bytes(gguf_metadata(BLOCK_CONFIG), tensors))
    return path


def q8_model(path: Path, name: str, metadata: Mapping[str, object] | None = None) -> Path:
    """A tiny checkpoint as a GGUF file, with most of its matrices in Q8_0.

    Args:
        path: the file.
        name: of the checkpoint.
        metadata: besides the model's, or instead of it.
    """
    import gguf

    config = open_checkpoint(TINY / name).config
    stored = read_safetensors(TINY / name / "model.safetensors")
    arrays = {name: tensor.view().astype(np.float32) for name, tensor in stored.items()}

    def encode(name, array):
        if array.ndim == 1 or array.shape[1] % 32:
            return "F32", array.tobytes()
        return "Q8_0", gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0).tobytes()

    values = gguf_metadata(config) | dict(metadata or {})
    path.write_bytes(gguf_bytes(values, gguf_tensors(arrays, config, encode)))
    return path
