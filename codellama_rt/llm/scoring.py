"""Logits of every token of a known sequence: for perplexity, evaluation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Collection
from numbers import Integral
from typing import Any

import numpy as np

from codellama_rt.engine.batching import build_batch
from codellama_rt.engine.request import checked_prompt
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


def logits_by_chunk(
    model: Decoder,
    token_ids: Collection[int],
    *,
    first_position: int = 0,
    kv_dtype: str = "float32",
    block_size: int = 64,
    chunk_size: int = 512,
    adapter: LoraAdapter | None = None,
    forward: Callable[[Batch, KVCache], np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the same chunk by chunk, for sequences whose logits would not fit the memory.

    Args:
        model: anything with `forward(batch, kv_cache)`.
        token_ids: the sequence, at least one token.
        first_position: position of its first token for RoPE; attention starts there as well.
        kv_dtype: of the cache.
        block_size: tokens per block.
        chunk_size: tokens per step; no bit of the result depends on it.
        adapter: applied to all tokens.
        forward: runs the model; None: its own `forward`. `Engine.forward` waits for its turn.

    Yields:
        (tokens of the chunk, vocab_size) float32.

    Raises:
        TypeError: no integers.
        ValueError: no token, one outside the vocabulary, or positions outside [0, MAX_POSITION).
    """
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
    is_dynamic = scaling is not None and scaling.kind == "dynamic"
    kv_cache = make_kv_cache(model, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype)
    for begin in range(0, len(ids), chunk_size):
        end = min(begin + chunk_size, len(ids))
        batch = build_batch(
            [Chunk(sequence, begin, end, end - begin)], block_size, rope_lengths=is_dynamic
        )
        batch.positions += np.int32(first_position)
        if batch.rope_lengths is not None:
            batch.rope_lengths += np.int32(first_position)
        yield (forward or model.forward)(batch, kv_cache)
