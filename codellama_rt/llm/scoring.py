"""Logits and hidden states of every token of a known sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Collection
from numbers import Integral
from typing import Any

import numpy as np

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.request_checks import checked_prompt
from codellama_rt.engine.sequence import Chunk, Sequence, int32_list
from codellama_rt.llm.placement import make_kv_cache
from codellama_rt.model.batch import Batch
from codellama_rt.model.interface import Decoder, KVCache
from codellama_rt.model.lora import LoraAdapter, check_adapter

MAX_POSITION = 2**20  # RoPE's tables hold every position below: 1 GB at head_dim 128


def sequence_logits(
    model: Decoder, token_ids: Collection[int], *, first_position: int = 0, **options: Any
) -> np.ndarray:
    """Return the logits after every token, computed in chunks in a KV cache of the call's own.

    Args:
        model: anything with `forward(batch, kv_cache)`.
        token_ids: the sequence, at least one token.
        first_position: position of its first token for RoPE; attention starts there as well.
        **options: as `logits_by_chunk` takes them.

    Returns:
        (len(token_ids), vocab_size) float32.

    Raises:
        TypeError, ValueError: as `logits_by_chunk`.
    """
    chunks = logits_by_chunk(model, token_ids, first_position=first_position, **options)
    return np.concatenate(list(chunks))


def sequence_hidden_states(
    model: Decoder,
    token_ids: Collection[int],
    *,
    hidden_states: Callable[[Batch, KVCache], np.ndarray],
    **options: Any,
) -> np.ndarray:
    """Return what the layers pass on for every token, computed in chunks like the logits.

    Args:
        model: one that `gives_hidden_states`.
        token_ids: the sequence, at least one token.
        hidden_states: runs the model for (states, tokens of the chunk, dim).
        **options: as `logits_by_chunk` takes them.

    Returns:
        (states, len(token_ids), dim) float32.

    Raises:
        TypeError, ValueError: as `logits_by_chunk`; or the model has no hidden states to give.
    """
    if not model.gives_hidden_states:
        raise ValueError("hidden states are supported on device='cpu' with runtime='direct' only")
    chunks = [hidden_states(*step) for step in _steps(model, token_ids, **options)]
    return np.concatenate(chunks, axis=1)


def logits_by_chunk(
    model: Decoder,
    token_ids: Collection[int],
    *,
    forward: Callable[[Batch, KVCache], np.ndarray] | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yield the same chunk by chunk, for sequences whose logits would not fit the memory.

    Args:
        model: anything with `forward(batch, kv_cache)`.
        token_ids: the sequence, at least one token.
        forward: runs the model; None: its own `forward`. `Engine.forward` waits for its turn.
        **options: first_position (of the first token for RoPE, 0), kv_dtype (of the cache,
            "float32"), block_size (tokens per block, 64), chunk_size (tokens per step, 512; no bit
            of the result depends on it), adapter (applied to all tokens, None).

    Yields:
        (tokens of the chunk, vocab_size) float32.

    Raises:
        TypeError: no integers.
        ValueError: no token, one outside the vocabulary, or positions outside [0, MAX_POSITION).
    """
    for step in _steps(model, token_ids, **options):
        yield (forward or model.forward)(*step)


def _steps(
    model: Decoder,
    token_ids: Collection[int],
    *,
    first_position: int = 0,
    kv_dtype: str = "float32",
    block_size: int = 64,
    chunk_size: int = 512,
    adapter: LoraAdapter | None = None,
) -> Iterator[tuple[Batch, KVCache]]:
    """Yield the arguments of the steps that compute a sequence in a KV cache of the call's own."""
    ids = checked_prompt(token_ids, model.config.vocab_size)
    if isinstance(first_position, bool) or not isinstance(first_position, Integral):
        raise TypeError(f"first_position must be an int, got {type(first_position).__name__}")
    if not 0 <= first_position <= MAX_POSITION - len(ids):
        raise ValueError(
            f"first_position must be in [0, {MAX_POSITION - len(ids)}] for {len(ids)} tokens, "
            f"got {first_position}"
        )
    num_blocks = -(-len(ids) // block_size)
    if adapter is not None:
        check_adapter(adapter, model)
    sequence = Sequence(ids, len(ids), (0, 0, 0), first_logit=0, adapter=adapter)
    sequence.block_ids = int32_list(range(num_blocks))
    scaling = model.config.rope_scaling
    is_dynamic = scaling is not None and scaling.depends_on_length
    kv_cache = make_kv_cache(model, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    for begin in range(0, len(ids), chunk_size):
        end = min(begin + chunk_size, len(ids))
        batch = build_batch(
            [Chunk(sequence, begin, end, end - begin)], block_size, rope_lengths=is_dynamic
        )
        batch.positions += np.int32(first_position)
        if batch.rope_lengths is not None:
            batch.rope_lengths += np.int32(first_position)
        yield batch, kv_cache


def pooled(
    states: Iterable[np.ndarray], count: int, dim: int, pooling: str, normalize: bool
) -> np.ndarray:
    """Return one vector per sequence.

    Args:
        states: of each sequence, (tokens, dim).
        count: how many sequences.
        dim: of the states.
        pooling: "last" or "mean", over the tokens.
        normalize: divide each vector by its length.

    Returns:
        (count, dim) float32.

    Raises:
        ValueError: an unknown pooling.
    """
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling must be 'last' or 'mean', got {pooling!r}")
    vectors = np.empty((count, dim), np.float32)
    for vector, tokens in zip(vectors, states, strict=True):
        whole = tokens[-1].astype(np.float64) if pooling == "last" else tokens.mean(0, np.float64)
        length = np.linalg.norm(whole) if normalize else 1.0
        vector[:] = whole / length if length > 0.0 else whole
    return vectors
