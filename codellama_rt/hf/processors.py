"""Processors of the next token's scores that depend on the tokens so far, as in Transformers.

A processor is called with (input_ids, scores), NumPy arrays (rows, length) int64 and
(rows, vocab_size) float64, and returns scores. Callers may add their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from codellama_rt.hf.generation_config import GenerationConfig

Array = np.ndarray
LogitsProcessor = Callable[[Array, Array], Any]


class RepetitionPenalty:
    """Divide positive scores of tokens that occurred before, multiply negative ones.

    CTRL (arXiv:1909.05858), section 4.1.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Apply the penalty."""
        seen = np.take_along_axis(scores, input_ids, axis=1)
        seen = np.where(seen < 0, seen * self._penalty, seen / self._penalty)
        np.put_along_axis(scores, input_ids, seen, axis=1)
        return scores


class NoRepeatNGram:
    """Forbid the token that would complete a run of `size` tokens for the second time."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Forbid repetitions."""
        size, length = self._size, input_ids.shape[1]
        if length < size:
            return scores
        for ids, row in zip(input_ids, scores, strict=True):
            runs = np.lib.stride_tricks.sliding_window_view(ids, size)
            ending = ids[length - size + 1 :]
            row[runs[(runs[:, :-1] == ending).all(axis=1), -1]] = -np.inf
        return scores


class BadWords:
    """Forbid runs of tokens: the last one of a run, after those before it."""

    def __init__(self, runs: Collection[Sequence[int]]) -> None:
        self._runs = runs

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Forbid the last tokens of runs that are complete but for them."""
        for *begin, last in self._runs:
            if len(begin) > input_ids.shape[1]:
                continue
            ending = input_ids[:, input_ids.shape[1] - len(begin) :]
            scores[(ending == begin).all(axis=1), last] = -np.inf
        return scores


class Suppress:
    """Forbid tokens, optionally only while the rows are shorter than `until`."""

    def __init__(self, token_ids: Collection[int], until: float = np.inf) -> None:
        self._token_ids, self._until = list(token_ids), until

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Forbid the tokens."""
        if input_ids.shape[1] < self._until:
            scores[:, self._token_ids] = -np.inf
        return scores


class SequenceBias:
    """Add to the score of the last token of a run, after those before it."""

    def __init__(self, biases: Collection[tuple[Sequence[int], float]]) -> None:
        self._biases = biases

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Add the biases; those of runs that end alike add up."""
        length = input_ids.shape[1]
        for (*begin, last), bias in self._biases:
            if len(begin) <= length:
                ending = input_ids[:, length - len(begin) :]
                scores[(ending == begin).all(axis=1), last] += bias
        return scores


class Forced:
    """Allow only some tokens where the rows have one length."""

    def __init__(self, token_ids: Collection[int], length: int) -> None:
        self._token_ids, self._length = list(token_ids), length

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Forbid all other tokens."""
        if input_ids.shape[1] == self._length:
            scores[:] = -np.inf
            scores[:, self._token_ids] = 0.0
        return scores


class ExponentialDecay:
    """Raise the scores of end tokens, the more the longer the rows."""

    def __init__(self, token_ids: Collection[int], start: int, factor: float) -> None:
        self._token_ids, self._start, self._factor = list(token_ids), start, factor

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        """Raise the scores."""
        since = input_ids.shape[1] - self._start
        if since > 0:
            ends = scores[:, self._token_ids]
            scores[:, self._token_ids] = ends + np.abs(ends) * (self._factor**since - 1.0)
        return scores


def remove_invalid(input_ids: Array, scores: Array) -> Array:
    """Replace NaN by 0, and infinities by the largest and smallest float32."""
    limits = np.finfo(np.float32)
    return np.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min)


def renormalize(input_ids: Array, scores: Array) -> Array:
    """Return log-probabilities; rows without an allowed token stay as they are."""
    highest = scores.max(axis=1, keepdims=True)
    shifted = scores - np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted - np.where(np.isfinite(total), total, 0.0)


def make_processors(
    config: GenerationConfig,
    prompt_len: int,
    eos_token_ids: Collection[int],
    max_new_tokens: int | None = None,
) -> list[LogitsProcessor]:
    """Return the processors of a configuration, in Transformers' order.

    Args:
        config: the caller's configuration.
        prompt_len: tokens before the first new one.
        eos_token_ids: tokens that end a row; a bad word that is one of them is ignored.
        max_new_tokens: columns after the prompt; for `forced_eos_token_id`.
    """
    processors: list[LogitsProcessor] = []
    if config.sequence_bias:
        processors.append(SequenceBias(config.sequence_bias))
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenalty(config.repetition_penalty))
    if config.no_repeat_ngram_size > 0:
        processors.append(NoRepeatNGram(config.no_repeat_ngram_size))
    bad_words = [run for run in config.bad_words_ids if run not in {(i,) for i in eos_token_ids}]
    if bad_words:
        processors.append(BadWords(bad_words))
    shortest = max(config.min_length, prompt_len + config.min_new_tokens)
    if shortest > prompt_len:
        processors.append(Suppress(eos_token_ids, shortest))
    return [*processors, *_last_processors(config, prompt_len, eos_token_ids, max_new_tokens)]


def _last_processors(
    config: GenerationConfig,
    prompt_len: int,
    eos_token_ids: Collection[int],
    max_new_tokens: int | None,
) -> list[LogitsProcessor]:
    """Return those that say which tokens a row begins and ends with, or never holds."""
    processors: list[LogitsProcessor] = []
    if config.forced_bos_token_id is not None:
        processors.append(Forced([config.forced_bos_token_id], 1))
    if config.forced_eos_token_id and max_new_tokens is not None:
        last = prompt_len + max_new_tokens - 1
        processors.append(Forced(config.forced_eos_token_id, last))
    if config.remove_invalid_values:
        processors.append(remove_invalid)
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        processors.append(ExponentialDecay(eos_token_ids, prompt_len + start, factor))
    if config.suppress_tokens:
        processors.append(Suppress(config.suppress_tokens))
    if config.begin_suppress_tokens:
        processors.append(Suppress(config.begin_suppress_tokens, prompt_len + 1))
    return processors


def forbid_all_but(
    allowed: Callable[[int, Array], Collection[int]],
    prompts: Sequence[int],
    input_ids: Array,
    scores: Array,
) -> Array:
    """Apply Transformers' `prefix_allowed_tokens_fn`.

    Args:
        allowed: called for each row with (prompt's index, (length,) int64); returns token ids.
        prompts: which prompt each row continues.
        input_ids: (rows, length) int64.
        scores: (rows, vocab_size) float64, not changed.

    Raises:
        TypeError, ValueError: it returned no token, or something that is not a token.
    """
    masked = np.full_like(scores, -np.inf)
    for row, prompt in enumerate(prompts):
        found = allowed(prompt, input_ids[row].copy())
        ids = np.asarray(found.asnumpy() if hasattr(found, "asnumpy") else list(found))
        if not ids.size:
            raise ValueError(f"prefix_allowed_tokens_fn returned no token for prompt {prompt}")
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise TypeError(f"prefix_allowed_tokens_fn must return token ids, got {found!r:.60}")
        if not 0 <= ids.min() <= ids.max() < scores.shape[1]:
            raise ValueError(
                f"prefix_allowed_tokens_fn must return token ids in [0, {scores.shape[1]}), got "
                f"{ids.min()} to {ids.max()}"
            )
        masked[row, ids] = scores[row, ids]
    return masked


def process(processors: Sequence[LogitsProcessor], input_ids: Array, logits: Array) -> Array:
    """Apply processors one after another.

    Args:
        processors: built-in ones and the caller's.
        input_ids: (rows, length) int64.
        logits: (rows, vocab_size), not changed.

    Returns:
        (rows, vocab_size) float64.

    Raises:
        ValueError: a processor returned another shape.
    """
    scores = logits.astype(np.float64)
    for processor in processors:
        changed = processor(input_ids, scores)
        changed = changed.asnumpy() if hasattr(changed, "asnumpy") else np.asarray(changed)
        if changed.shape != logits.shape:
            raise ValueError(
                f"logits_processor {processor!r:.60} must return scores of shape {logits.shape}, "
                f"got {changed.shape}"
            )
        scores = changed.astype(np.float64, copy=False)
    return scores
