"""The operators on rows of logits: choose the next tokens, report log-probabilities."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from codellama_rt.ops.native import _core
from codellama_rt.ops.results import Array, axis_size, empty

__all__ = ["Sampled", "TokenLists", "TokenLogprobs", "sample", "token_logprobs"]


class Sampled(NamedTuple):
    """What `sample` returns.

    Attributes:
        token_ids: (num_samples) int32. Where no token can be chosen, the first one with the highest
            score, or the first NaN: what to name in a message.
        has_token: (num_samples) bool: whether the highest logit and the highest score are finite.
    """

    token_ids: Array
    has_token: Array


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns.

    Attributes:
        logprobs: (num_tokens, 1 + num_top) float64: of the given token, then of the likeliest ones.
            NaN for a row whose highest logit is not finite.
        ranks: (num_tokens) int32 of the given tokens, from 1; of equal ones the lower id goes
            first.
        top_ids: (num_tokens, num_top) int32: the likeliest tokens, the likeliest first; -1 where
            there are no more.
    """

    logprobs: Array
    ranks: Array
    top_ids: Array


class TokenLists(NamedTuple):
    """One list of tokens per sample, with a number for each token.

    Attributes:
        offsets: (num_samples + 1) int32, rising from 0: where each sample's list begins.
        token_ids: (offsets[-1]) int32, one list after another.
        values: (offsets[-1]); int32 counts or float64 biases.
    """

    offsets: Array
    token_ids: Array
    values: Array


def sample(
    logits: Array,
    *,
    rows: Array = None,
    temperature: Array | float = 1.0,
    top_k: Array | int = 0,
    top_p: Array | float = 1.0,
    min_p: Array | float = 0.0,
    seed: Array | int = 0,
    index: Array | int = 0,
    position: Array | int = 0,
    repetition_penalty: Array | float = 1.0,
    presence_penalty: Array | float = 0.0,
    frequency_penalty: Array | float = 0.0,
    seen: TokenLists | None = None,
    bias: TokenLists | None = None,
    masks: Array = None,
    mask_rows: Array = None,
    num_threads: int | None = None,
) -> Sampled:
    """Choose the token that follows each row of logits, all rows on all threads.

    In this order, in float64: penalties, bias, mask; then temperature, top-k, top-p, min-p and a
    draw. The draw inverts the cumulative distribution over ascending tokens at a number that
    Philox4x64-10 makes of (seed, index, position). A sample depends on its own arguments alone: not
    on the others, on threads, or on the instruction set.

    Args:
        logits: (num_logits, vocab_size) float32.
        rows: (num_samples) int32: which row of the logits each sample reads; default: all, in
            order.
        temperature: (num_samples) float64, like all that follow, or one number for all. 0: the
            highest score, of equal ones the lowest token.
        top_k: int32; keep so many highest scores, and those equal to the last; 0: all.
        top_p: in (0, 1]: keep the likeliest tokens with at most this probability before them
            (nucleus sampling, arXiv:1904.09751), of equal ones the lower ids.
        min_p: in [0, 1]: keep tokens of at least this fraction of the likeliest one's probability.
        seed: uint64.
        index: uint64: which of several samples with one seed.
        position: uint64 of the new token in its sequence.
        repetition_penalty: in [0.01, 100]: divides positive scores of seen tokens and multiplies
            negative ones.
        presence_penalty: subtracted once from the score of each token of the output.
        frequency_penalty: subtracted once per occurrence in the output.
        seen: each token of prompt and output once, with its int32 count in the output.
        bias: float64 numbers added to the scores of tokens; -inf forbids.
        masks: (num_masks, ceil(vocab_size / 32)) uint32: token i is allowed where bit i % 32 of
            word i // 32 is set.
        mask_rows: (num_samples) int32: each sample's row of `masks`; -1: none. Default: all, in
            order, if there are masks.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        The tokens, and where there was none to choose.

    Example:
        >>> sample(np.array([[0, 1, 3], [2, 0, 1]], np.float32), temperature=0).token_ids
        array([2, 0], dtype=int32)
    """
    if rows is None:
        rows = np.arange(axis_size(logits, 0), dtype=np.int32)
    num_samples = axis_size(rows, 0)

    def each(value: Array | float, dtype: type) -> Array:
        return np.full(num_samples, value, dtype) if isinstance(value, (int, float)) else value

    if masks is None:
        masks, default_rows = _no_masks(num_samples, -(-axis_size(logits, 1) // 32))
    else:
        default_rows = np.arange(num_samples, dtype=np.int32)
    result = Sampled(
        empty(logits, (num_samples,), np.int32), empty(logits, (num_samples,), np.bool_)
    )
    _core.sample(
        logits,
        rows,
        each(temperature, np.float64),
        each(top_k, np.int32),
        each(top_p, np.float64),
        each(min_p, np.float64),
        each(seed, np.uint64),
        each(index, np.uint64),
        each(position, np.uint64),
        each(repetition_penalty, np.float64),
        each(presence_penalty, np.float64),
        each(frequency_penalty, np.float64),
        *(_no_lists(num_samples, np.int32) if seen is None else seen),
        *(_no_lists(num_samples, np.float64) if bias is None else bias),
        masks,
        default_rows if mask_rows is None else mask_rows,
        *result,
        num_threads,
    )
    return result


def token_logprobs(
    logits: Array,
    token_ids: Array,
    num_top: int = 0,
    *,
    rows: Array = None,
    num_threads: int | None = None,
) -> TokenLogprobs:
    """Return log-probabilities, in float64, of given tokens and of the likeliest ones.

    Args:
        logits: (num_logits, vocab_size) float32.
        token_ids: (num_tokens) int32.
        num_top: how many of the likeliest tokens to report besides.
        rows: (num_tokens) int32: the row of the logits that each token is looked up in; default:
            all, in order.
        num_threads: at most so many threads take part; all of `ops.num_threads()` by default.

    Returns:
        Log-probabilities, ranks, and the likeliest tokens.

    Example:
        >>> token_logprobs(np.zeros((1, 2), np.float32), np.array([1], np.int32), 1).ranks
        array([2], dtype=int32)
    """
    num_tokens = axis_size(token_ids, 0)
    if rows is None:
        rows = np.arange(num_tokens, dtype=np.int32)
    result = TokenLogprobs(
        empty(logits, (num_tokens, 1 + num_top), np.float64),
        empty(logits, (num_tokens,), np.int32),
        empty(logits, (num_tokens, num_top), np.int32),
    )
    _core.token_logprobs(logits, rows, token_ids, *result, num_threads)
    return result


# A step without penalties, bias and masks asks for these again and again; nobody writes to them.
@lru_cache(maxsize=64)
def _no_lists(num_samples: int, dtype: type) -> TokenLists:
    offsets = np.zeros(num_samples + 1, np.int32)
    return TokenLists(offsets, np.empty(0, np.int32), np.empty(0, dtype))


@lru_cache(maxsize=64)
def _no_masks(num_samples: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((0, words), np.uint32), np.full(num_samples, -1, np.int32)
