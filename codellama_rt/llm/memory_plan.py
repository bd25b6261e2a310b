"""What a model takes of memory, and how fast this machine can read it, before it is opened.

`LLM` refuses by these figures what cannot fit; `codellama-rt estimate` shows them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codellama_rt.checkpoint import check_choices, check_stored_quantization
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.model_names import resolve_model
from codellama_rt.checkpoint.open import read_model
from codellama_rt.checkpoint.quantize import is_quantized, sources
from codellama_rt.checkpoint.stored_tensor import ENCODINGS, StoredModel, StoredTensor
from codellama_rt.checkpoint.weight_loading import (
    choose_dtype,
    expected_shapes,
    match_tensors,
    used_as_stored,
    used_in_place,
)
from codellama_rt.llm.kv_plan import REQUIRED_SHARE
from codellama_rt.llm.memory import HUGE_PAGE_BYTES
from codellama_rt.llm.variants import find_variant
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.model.llama import Activations
from codellama_rt.model.rope import table_bytes
from codellama_rt.model.weights import LlamaWeights
from codellama_rt.ops.dtypes import numpy_dtype
from codellama_rt.ops.quantized import weight_num_bytes
from codellama_rt.text.tokenizer import has_tokenizer

# Of a process that has imported the runtime and run an operator: Python 3.11, NumPy and kernels,
# measured as resident on x86-64 Linux. Nothing of a model is in it.
INTERPRETER_BYTES = 43_200_000
# A tokenizer, of whatever kind: measured at 25.2 MB with 32,016 pieces and 34.7 MB with 49,152.
_TOKENIZER_BYTES, _PIECE_BYTES = 7_400_000, 554
# The gguf package, which decodes blocks, and its work on some rows.
_DECODER_BYTES = 11_000_000
# What the kernels keep for each token beside the activations: the input of the widest product in
# bfloat16; and what stays of the first step's small things.
_PACKED_ITEM_BYTES, _STEP_BYTES = 2, 4_500_000


@dataclass(frozen=True)
class Estimate:
    """Bytes, when every weight has been read and the caches are full.

    Attributes:
        weights: as they are computed with: mapped ones, and those made anew.
        made: of them those made anew: converted, quantised or put together when loading.
        read_per_token: of the weights those that every step reads.
        loading: most that loading takes at once; what is used where it lies is not read yet.
        kv: keys and values of all sequences, in whole pages.
        activations: of a step, with what kernels keep and RoPE's tables.
        tokenizer: of the model.
        decoder: what reads a GGUF file's blocks, where they are not used as they lie.
        interpreter: Python, NumPy and the kernels, before any model.
    """

    weights: int
    made: int
    read_per_token: int
    loading: int
    kv: int
    activations: int
    tokenizer: int
    decoder: int
    interpreter: int = INTERPRETER_BYTES

    @property
    def peak(self) -> int:
        """The most that is resident at once."""
        running = self.weights + self.kv + self.activations + self.tokenizer
        return self.interpreter + self.decoder + max(running, self.loading)

    @property
    def added(self) -> int:
        """The same without the interpreter, which runs already."""
        return self.peak - self.interpreter

    def fits(self, available: int) -> bool:
        """Whether so many bytes are enough, as `LLM` decides it: some stay free beside a cache."""
        room = REQUIRED_SHARE * (available - self.weights)
        return self.added <= available and self.kv <= room

    def tokens_per_s(self, bandwidth: float, kv_bytes: int, num_seqs: int) -> float:
        """The most tokens a second that reading allows.

        Args:
            bandwidth: bytes a second.
            kv_bytes: of the caches, which a step reads whole.
            num_seqs: sequences in a step; the weights are read once for all of them.
        """
        return num_seqs * bandwidth / (self.read_per_token + kv_bytes)


def find_model(model: str | os.PathLike[str]) -> StoredModel:
    """The headers of a checkpoint, or what they would be for a published name or a config.json.

    Args:
        model: anything that `LLM` opens; "CodeLlama-34b" and the like, without any file; or a
            config.json.

    Raises:
        CheckpointError: none of these, or a damaged one.
        RuntimeError: a named model cannot be fetched.
    """
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return stored_from_config(ModelConfig.from_hf(read_object(path), str(path)))
    variant = None if path.exists() else find_variant(model)
    if variant is not None:
        return stored_from_config(variant.config)
    return read_model(resolve_model(model))


def stored_from_config(config: ModelConfig) -> StoredModel:
    """A checkpoint of this shape, in its dtype and one file, that has headers and no bytes."""
    dtype = numpy_dtype(config.dtype)
    encoding = next(name for name, known in ENCODINGS.items() if known == dtype)
    tensors = {
        name: StoredTensor(name, Path(), encoding, shape, _no_bytes(shape, dtype.itemsize))
        for name, shape in expected_shapes(config).items()
    }
    return StoredModel(Path(), config, tensors, {})


def _no_bytes(shape: tuple[int, ...], itemsize: int) -> np.ndarray:
    """As many bytes as a tensor has, all of them the same one."""
    return np.broadcast_to(np.uint8(0), (int(np.prod(shape)) * itemsize,))


def float_dtype(stored: StoredModel, dtype: str) -> str:
    """The dtype of the floats, which the KV cache takes unless told otherwise."""
    return choose_dtype(match_tensors(stored)).name if dtype == "auto" else dtype


def estimate(
    stored: StoredModel, *, context: int, num_seqs: int = 1, dtype: str = "auto",
    quantization: str | None = None, kv_dtype: str = "auto", block_size: int = 64,
    max_num_batched_tokens: int = 512,
) -> Estimate:  # fmt: skip
    """What a model will take, from its headers alone.

    Args:
        stored: from `find_model`.
        context: tokens of each sequence.
        num_seqs: sequences at a time.
        dtype: as in `LLM`.
        quantization: as in `LLM`.
        kv_dtype: as in `LLM`.
        block_size: as in `LLM`.
        max_num_batched_tokens: as in `LLM`.

    Returns:
        The figures, in bytes.

    Raises:
        CheckpointError: a tensor is missing or unknown, or the weights are quantised otherwise.
        ValueError: a dtype that the KV cache of this model cannot have.

    Example:
        >>> estimate(find_model("CodeLlama-7b"), context=100_000).kv // 10**9
        52
    """
    check_choices(dtype)
    check_stored_quantization(stored, quantization)
    config, tensors = stored.config, match_tensors(stored)
    if quantization is not None:
        tensors = sources(tensors)
    weights, loading, read_per_token, made = _weights(tensors, dtype, quantization)
    num_tokens = min(context * num_seqs, max_num_batched_tokens)
    activations = num_tokens * (
        4 * sum(Activations.widths(config).values()) + _PACKED_ITEM_BYTES * config.hidden_dim
    )
    decodes = made > 0 and not all(tensor.is_float for tensor in tensors.values())
    return Estimate(
        weights, made, read_per_token, loading,
        kv_bytes(config, float_dtype(stored, dtype) if kv_dtype == "auto" else kv_dtype,
                 context, num_seqs, block_size),
        activations + table_bytes(config, context) + _STEP_BYTES,
        _tokenizer_bytes(stored), _DECODER_BYTES * decodes,
    )  # fmt: skip


def _weights(
    tensors: Mapping[str, StoredTensor], dtype: str, quantization: str | None
) -> tuple[int, int, int, int]:
    """Bytes of all weights, at most while loading, read by every step, and made when loading."""
    target = choose_dtype(tensors) if dtype == "auto" else numpy_dtype(dtype)
    kept = used_as_stored(tensors, target, dtype == "auto", quantization)
    mapped = used_in_place(tensors, kept)
    total = loading = made = 0
    sizes = {}
    for name, tensor in tensors.items():
        if name in kept:
            total, sizes[name] = total + tensor.num_bytes, tensor.num_bytes
            made += 0 if name in mapped else tensor.num_bytes
            continue
        if quantization is not None and is_quantized(name):
            size = weight_num_bytes(quantization, tensor.shape)
        else:
            size = tensor.size * target.itemsize
        loading = max(loading, made + size + tensor.num_bytes)
        total, made = total + size, made + size
        sizes[name] = size
    is_tied = "lm_head.weight" not in tensors
    return total, loading, total - (0 if is_tied else sizes["model.embed_tokens.weight"]), made


def _tokenizer_bytes(stored: StoredModel) -> int:
    """Of a model's tokenizer; none where its directory has none."""
    is_bare = stored.path != Path() and stored.path.is_dir() and not has_tokenizer(stored.path)
    return 0 if is_bare else _TOKENIZER_BYTES + _PIECE_BYTES * stored.config.vocab_size


def kv_bytes(
    config: ModelConfig, dtype: str, context: int, num_seqs: int, block_size: int = 64
) -> int:
    """Bytes of keys and values of `num_seqs` sequences of `context` tokens, in whole pages."""
    blocks = -(-context // block_size) * num_seqs
    exact = blocks * block_size * bytes_per_token(config, dtype)
    return -(-exact // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def require_memory(needed: Estimate, available: int) -> None:
    """Refuses a model whose weights, with one step's activations, cannot be held.

    Raises:
        RuntimeError: it does not fit; the message has the figures and the ways out.
    """
    least = max(needed.weights + needed.activations + needed.tokenizer, needed.loading)
    if least > available:
        raise RuntimeError(
            f"the model needs {least / 1e9:.2f} GB beside its KV cache (weights "
            f"{needed.weights / 1e9:.2f}, while loading {needed.loading / 1e9:.2f}, activations "
            f"{needed.activations / 1e9:.2f}), and {available / 1e9:.2f} GB are available; "
            "use quantization='int4', or a model that `codellama-rt convert` quantised"
        )


def weight_bytes(weights: LlamaWeights) -> int:
    """Bytes of weights that every step reads: all but the embedding, of which it takes few rows.

    Args:
        weights: of the model; a tied embedding is read whole, as the head.
    """
    layers = sum(array.nbytes for layer in weights.layers for array in vars(layer).values())
    return layers + weights.norm.nbytes + weights.lm_head.nbytes
