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


def make_processors(
    config: GenerationConfig, prompt_len: int, eos_token_ids: Collection[int]
) -> list[LogitsProcessor]:
    """Return the processors of a configuration, in Transformers' order.

    Args:
        config: the caller's configuration.
        prompt_len: tokens before the first new one.
        eos_token_ids: tokens that end a row; a bad word that is one of them is ignored.
    """
    processors: list[LogitsProcessor] = []
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
    if config.suppress_tokens:
        processors.append(Suppress(config.suppress_tokens))
    return processors


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
