"""What greedy search, sampling and beam search share: rows, what ends them, what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codellama_rt.engine.stop_strings import TextStream
from codellama_rt.hf.generation_config import GenerationConfig
from codellama_rt.hf.processors import (
    LogitsProcessor,
    forbid_all_but,
    process,
    renormalize,
)

StoppingCriterion = Callable[[np.ndarray, Any], Any]
AllowedTokens = Callable[[int, np.ndarray], Collection[int]]


@dataclass
class Search:
    """One call of generate.

    Attributes:
        config: what the caller asked for.
        prompts: token ids of each row, without padding.
        padded: (rows, width) int64, the prompts as the caller gave them.
        ends: the tokens that end each row.
        pad_id: fills rows.
        max_new_tokens: columns the result may have after the prompts.
        max_model_len: maximum tokens per row.
        seed: of the draws.
        processors: the configuration's, called with (input_ids, scores).
        allowed: called with (prompt's index, row); the only tokens that may follow; or None.
        callers_processors: called last.
        criteria: called with (input_ids, scores); True or (rows,) of bool ends rows.
        streamer: takes the prompt, then each token; or None.
        tokenizer: for stop strings; None without them.
        adapter: applied to all rows, or None.
    """

    config: GenerationConfig
    prompts: list[list[int]]
    padded: np.ndarray
    ends: list[frozenset[int]]
    pad_id: int
    max_new_tokens: int
    max_model_len: int
    seed: int = 0
    processors: Sequence[LogitsProcessor] = ()
    allowed: AllowedTokens | None = None
    callers_processors: Sequence[LogitsProcessor] = ()
    criteria: Sequence[StoppingCriterion] = ()
    streamer: Any = None
    tokenizer: Any = None
    adapter: Any = None

    def processed(
        self, prompts: Sequence[int], input_ids: np.ndarray, logits: np.ndarray
    ) -> np.ndarray:
        """Apply all processors.

        Args:
            prompts: which prompt each row continues.
            input_ids: (rows, length) int64.
            logits: (rows, vocab_size), not changed.

        Returns:
            (rows, vocab_size) float64.
        """
        scores = process(self.processors, input_ids, logits)
        if self.allowed is not None:
            scores = forbid_all_but(self.allowed, prompts, input_ids, scores)
        scores = process(self.callers_processors, input_ids, scores)
        return renormalize(input_ids, scores) if self.config.renormalize_logits else scores

    def stopped(self, input_ids: np.ndarray, scores: Any) -> np.ndarray:
        """Which rows the caller's criteria end.

        Returns:
            (rows,) bool.
        """
        stopped = np.zeros(len(input_ids), bool)
        for criterion in self.criteria:
            answer = criterion(input_ids, scores)
            answer = answer.asnumpy() if hasattr(answer, "asnumpy") else np.asarray(answer)
            stopped |= answer.astype(bool)
        return stopped

    def text_watch(self, prompt: Collection[int]) -> TextStream | None:
        """Return what looks for stop strings in a row, or None without stop strings."""
        if not self.config.stop_strings:
            return None
        return TextStream(self.tokenizer.detokenizer(prompt), self.config.stop_strings)


@dataclass
class Found:
    """What a search has found.

    Attributes:
        rows: the new tokens of each result.
        parents: of each result the prompt's index.
        scores, logits: (rows, vocab_size) float32 a step, if asked for.
        sequences_scores: of a beam search, a number a result.
        beams: of a beam search, the beam each token of each result came of.
    """

    rows: list[list[int]]
    parents: list[int]
    scores: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    sequences_scores: list[float] | None = None
    beams: list[list[int]] | None = None

    def record(self, config: GenerationConfig, logits: np.ndarray, scores: np.ndarray) -> None:
        """Keep a step's logits and processed scores, as far as they were asked for."""
        if config.output_logits:
            self.logits.append(logits.astype(np.float32))
        if config.output_scores:
            self.scores.append(scores.astype(np.float32))


def padded_rows(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of several lengths as one array, filled on the right; (rows, longest) int64."""
    array = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return array


def time_limit(max_time: float | None) -> list[StoppingCriterion]:
    """Return the criterion that ends all rows so many seconds from now; none without a limit."""
    if max_time is None:
        return []
    end = time.monotonic() + max_time
    return [lambda input_ids, scores: time.monotonic() > end]


def nothing_allowed(highest: float) -> ValueError:
    """Return the error for rows that no token may follow."""
    return ValueError(
        f"no token can come next: the highest score is {highest}; check bad_words_ids, "
        "suppress_tokens, prefix_allowed_tokens_fn and logits_processor"
    )
