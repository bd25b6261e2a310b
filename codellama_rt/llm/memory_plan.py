"""What a model takes of memory, and how fast this machine can read it, before it is opened.

`LLM` rejects models that cannot fit by these figures; `codellama-rt estimate` shows them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codellama_rt.checkpoint import check_stored_quantization
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.open import Opened, resolve
from codellama_rt.checkpoint.quantize import is_quantized, sources
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.checkpoint.tensor_names import EMBEDDING, HEAD, expected_shapes
from codellama_rt.checkpoint.weight_loading import copied, repacked, used_as_stored, used_in_place
from codellama_rt.llm.kv_plan import REQUIRED_SHARE, plan_num_blocks
from codellama_rt.llm.memory import HUGE_PAGE_BYTES, available_bytes
from codellama_rt.llm.plan import Plan
from codellama_rt.llm.variants import find_variant
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.kv_cache import bytes_per_token
from codellama_rt.model.llama import Activations
from codellama_rt.model.rope import table_bytes
from codellama_rt.model.weights import LlamaWeights
from codellama_rt.ops.dtypes import ENCODINGS, numpy_dtype
from codellama_rt.ops.quantized import TILED, weight_num_bytes
from codellama_rt.text.tokenizer import has_tokenizer

# Of a process that has imported the runtime and run an operator: Python 3.11, NumPy and kernels,
# measured as resident on x86-64 Linux. Nothing of a model is in it.
INTERPRETER_BYTES = 45_200_000
# A tokenizer, of whatever kind: measured at 25.2 MB with 32,016 pieces and 34.7 MB with 49,152.
_TOKENIZER_BYTES, _PIECE_BYTES = 7_400_000, 554
# The gguf package, which decodes blocks, and its work on some rows.
_DECODER_BYTES = 6_000_000
# What the kernels keep for each token beside the activations: the input of the widest product, in
# float32 over float32 and float16 weights; and what stays of the first step's small things.
_PACKED_ITEM_BYTES, _PACKED_FLOAT_BYTES, _STEP_BYTES = 2, 4, 4_500_000


@dataclass(frozen=True)
class Estimate:
    """Bytes, when every weight has been read and the caches are full.

    Attributes:
        weights: as they are computed with: mapped ones, and those made anew.
        made: of them those made anew: converted, quantised, repacked, copied or put together when
            loading.
        repacked: of them those that `repack=False` leaves in the file.
        read_per_token: of the weights those that every step reads.
        loading: most that loading takes at once; what is used where it lies is not read yet.
        kv: keys and values of all sequences, in whole blocks.
        activations: of a step, with what kernels keep and RoPE's tables.
        tokenizer: of the model.
        decoder: what reads a GGUF file's blocks, where they are not used as they lie.
        interpreter: Python, NumPy and the kernels, before any model.
    """

    weights: int
    made: int
    repacked: int
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
        """Return the most tokens per second that reading allows.

        Args:
            bandwidth: bytes per second.
            kv_bytes: of the caches, which a step reads whole.
            num_seqs: sequences in a step; the weights are read once for all of them.
        """
        return num_seqs * bandwidth / (self.read_per_token + kv_bytes)


def find_model(model: str | os.PathLike[str]) -> Opened:
    """Return the headers of a checkpoint; of a published name or a config.json, what they would be.

    Args:
        model: anything that `LLM` opens; "CodeLlama-34b" and the like, without any file; or a
            config.json.

    Raises:
        CheckpointError: none of these, or a damaged one.
        RuntimeError: a named model cannot be fetched.
    """
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return opened_from_config(ModelConfig.from_hf(read_object(path), str(path)))
    variant = None if path.exists() else find_variant(model)
    if variant is not None:
        return opened_from_config(variant.config)
    return resolve(model)


def opened_from_config(config: ModelConfig) -> Opened:
    """Return a checkpoint of this shape, in its dtype and one file, with headers and no bytes."""
    dtype = numpy_dtype(config.dtype)
    encoding = next(name for name, known in ENCODINGS.items() if known == dtype)
    tensors = {
        name: StoredTensor(name, Path(), encoding, shape, _no_bytes(shape, dtype.itemsize))
        for name, shape in expected_shapes(config).items()
    }
    return Opened(
        path=Path(),
        config=config,
        tensors=tensors,
        generation_config={},
        stored_dtype=config.dtype,
    )


def _no_bytes(shape: tuple[int, ...], itemsize: int) -> np.ndarray:
    """As many bytes as a tensor has, all of them the same one."""
    return np.broadcast_to(np.uint8(0), (int(np.prod(shape)) * itemsize,))


def settle(opened: Opened, asked: Plan) -> Plan:
    """Settle what a plan leaves open: the cache's dtype, and its blocks where memory is the host's.

    Args:
        opened: from `resolve`.
        asked: for this model.

    Raises:
        ValueError, CheckpointError: as `estimate`.
        RuntimeError: the weights do not fit, or not `asked.max_model_len` tokens beside them.
    """
    plan = with_kv_dtype(opened, asked)
    if plan.device == "cuda":  # it has a memory of its own, asked when the weights are in it
        return plan
    needed = estimate(opened, plan, context=1)
    require_memory(needed, available_bytes())
    return replace(plan, num_blocks=plan_num_blocks(opened.config, plan, needed.weights))


def with_kv_dtype(opened: Opened, plan: Plan) -> Plan:
    """Return the plan with the dtype of the floats for its cache, unless it names another."""
    if plan.kv_dtype != "auto":
        return plan
    return replace(plan, kv_dtype=opened.float_dtype(plan.dtype))


def estimate(opened: Opened, plan: Plan, *, context: int, num_seqs: int = 1) -> Estimate:
    """Return what a model will take, from its headers alone.

    Args:
        opened: from `find_model` or `resolve`.
        plan: how it is held.
        context: tokens of each sequence.
        num_seqs: sequences at a time.

    Returns:
        The figures, in bytes.

    Raises:
        CheckpointError: a tensor is missing or unknown, or the weights are quantised otherwise.
        ValueError: a dtype that the KV cache of this model cannot have.

    Example:
        >>> estimate(find_model("CodeLlama-7b"), Plan(), context=100_000).kv // 10**9
        52
    """
    target = numpy_dtype(opened.float_dtype(plan.dtype))
    check_stored_quantization(opened, plan.quantization)
    config, tensors = opened.config, opened.tensors
    if plan.quantization is not None:
        tensors = sources(tensors)
    weights = _weights(tensors, target, plan)
    num_tokens = min(context * num_seqs, plan.max_num_batched_tokens)
    packs_floats = plan.quantization is None and plan.dtype in ("float32", "float16")
    packed = _PACKED_FLOAT_BYTES if packs_floats else _PACKED_ITEM_BYTES
    activations = num_tokens * (4 * Activations.written(config) + packed * config.hidden_dim)
    return Estimate(
        weights=weights.total,
        made=weights.made,
        repacked=weights.repacked,
        read_per_token=weights.read_per_token,
        loading=weights.loading,
        kv=kv_bytes(config, with_kv_dtype(opened, plan), context, num_seqs),
        activations=activations + table_bytes(config, context) + _STEP_BYTES,
        tokenizer=_tokenizer_bytes(opened),
        decoder=_DECODER_BYTES * weights.decodes,
    )


@dataclass
class _Weights:
    """Bytes of the weights: as in `Estimate`; and whether the gguf package decodes some."""

    total: int = 0
    loading: int = 0
    read_per_token: int = 0
    made: int = 0
    repacked: int = 0
    decodes: bool = False


def _weights(tensors: Mapping[str, StoredTensor], target: np.dtype, plan: Plan) -> _Weights:
    kept = used_as_stored(tensors, target, plan.dtype == "auto", plan.quantization)
    tiled = repacked(tensors, kept) if plan.repacks else set()
    moved = copied(tensors, kept) if plan.repacks else set()
    mapped = used_in_place(tensors, kept, tiled | moved)
    found, sizes = _Weights(), {}
    for name, tensor in tensors.items():
        if name in kept:
            dtype, size = tensor.weight_dtype, tensor.num_bytes
            if name in tiled or tensor.is_repacked:
                size = weight_num_bytes(dtype + TILED * (name in tiled), tensor.shape)
            beside = tensor.num_bytes * (name in tiled | moved)
            if tensor.is_repacked:  # its integers, byte by byte, and blocks
                beside = 2 * tensor.size + size * (name in tiled)
            elif beside:
                found.repacked += size
        else:
            if plan.quantization is not None and is_quantized(name):
                size = weight_num_bytes(plan.quantization, tensor.shape)
            else:
                size = tensor.size * target.itemsize
            beside = tensor.num_bytes
            found.decodes |= tensor.float_dtype is None
        if name not in mapped:
            found.loading = max(found.loading, found.made + size + beside)
            found.made += size
        found.total, sizes[name] = found.total + size, size
    is_tied = HEAD not in tensors
    found.read_per_token = found.total - (0 if is_tied else sizes[EMBEDDING])
    return found


def _tokenizer_bytes(opened: Opened) -> int:
    """Of a model's tokenizer; none where its directory has none."""
    is_directory = opened.path != Path() and opened.path.is_dir()
    if is_directory and not has_tokenizer(opened.path, None):
        return 0
    return _TOKENIZER_BYTES + _PIECE_BYTES * opened.config.vocab_size


def kv_bytes(config: ModelConfig, plan: Plan, context: int, num_seqs: int) -> int:
    """Bytes of keys and values of `num_seqs` sequences of `context` tokens, in whole blocks."""
    blocks = -(-context // plan.block_size) * num_seqs
    exact = blocks * plan.block_size * bytes_per_token(config, plan.kv_dtype)
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
            f"{needed.activations / 1e9:.2f}), and {available / 1e9:.2f} GB are available; use "
            + "repack=False, which leaves the weights in the file, " * (needed.repacked > 0)
            + "quantization='int4', or a model that `codellama-rt convert` quantised"
        )


def weight_bytes(weights: LlamaWeights) -> int:
    """Bytes of weights that every step reads: all but the embedding, of which it takes few rows.

    Args:
        weights: of the model; a tied embedding is read whole, as the head.
    """
    layers = sum(array.nbytes for layer in weights.layers for array in vars(layer).values())
    return layers + weights.norm.nbytes + weights.lm_head.nbytes
