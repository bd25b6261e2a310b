"""How long a step takes: a model of four numbers that learns from the steps of this machine.

    seconds = fixed + a * tokens + b * sum(tokens x keys they see) + c * sum(keys)

The fixed part reads the weights, `a` multiplies by them, `b` is the arithmetic of attention and `c`
reads the cache. They are fitted by ridge regression to the relative errors of the last steps: one
that took ten times as long, because a file was read for the first time, counts for a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from codellama_rt.model.config import ModelConfig


class Tokens(Protocol):
    """Consecutive tokens [start, stop) of one sequence, as `Chunk` has them."""

    start: int
    stop: int


# Where learning starts; the first steps correct it by orders of magnitude if need be.
_BYTES_PER_SECOND, _FLOPS_PER_SECOND, _CALL_SECONDS = 20e9, 100e9, 1e-3
_TRUST = 1e-3  # in those numbers, as a part of what one step weighs
# No step counts as faster than they say by more than this: its square times _TRUST is still seen
# in a float64 beside the sums, without which they may be singular.
_MOST_SPEEDUP = 1e4
_KEPT = 0.98  # of older steps' weight per step: the last 50 count
_MOST_LEARNED = 64  # steps at a time: most of them are followed by none that asks for a cost
# Kernels compute rows in such groups: after 16,000 tokens of 7B (bfloat16, Zen 4) 17 take 22 %
# longer than 16, and 33 take 17 % longer than 32.
_ROWS = 8
_LEAST = 1e-3  # of the starting number: no part of a step is for nothing


class StepCost:
    """Predict the seconds of a step.

    Example:
        >>> from codellama_rt.llm.variants import SHAPES
        >>> cost = StepCost(SHAPES["7b"])
        >>> 1 <= cost.num_tokens(1.0, start=100_000) < cost.num_tokens(1.0, start=0)
        True
    """

    def __init__(self, config: ModelConfig) -> None:
        """Start with what a small CPU would need for this model."""
        projections = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
        layer = projections + 3 * config.dim * config.hidden_dim
        params = config.n_layers * layer + config.vocab_size * config.dim
        cache = config.n_layers * config.n_kv_heads * config.head_dim
        self._unit = np.array(
            [
                _CALL_SECONDS + 2 * params / _BYTES_PER_SECOND,
                2 * params / _FLOPS_PER_SECOND,
                4 * config.n_layers * config.n_heads * config.head_dim / _FLOPS_PER_SECOND,
                2 * 2 * cache / _BYTES_PER_SECOND,
            ]
        )
        self._factors = np.ones(4)  # of the four, in those units
        self._products = np.zeros((4, 4))  # of rows with one another, as far as they count
        self._sums = np.zeros(4)  # of rows
        self._is_fitted = True
        self._learned: list[tuple[np.ndarray, np.ndarray, float]] = []  # not yet in the sums

    @property
    def fixed(self) -> float:
        """Seconds of a step, however few tokens it has."""
        return float(self._coefficients()[0])

    def parts(self) -> tuple[float, float, float, float]:
        """Return the seconds of a step, of a token's products, of a token and a key, of a key."""
        fixed, token, pair, key = self._coefficients().tolist()
        return fixed, token, pair, key

    def learn(self, positions: np.ndarray, seq_lens: np.ndarray, seconds: float) -> None:
        """Take a step that has been computed into account.

        Args:
            positions: (num_tokens,) integers, of each token in its sequence; kept for a while.
            seq_lens: (num_seqs,) integers, the tokens of each sequence up to its last one here.
            seconds: how long it took.
        """
        self._learned.append((positions, seq_lens, seconds))
        if len(self._learned) == _MOST_LEARNED:
            self._learn()

    def seconds(self, chunks: Iterable[Tokens]) -> float:
        """Return how long a step of these chunks takes, the fixed part included."""
        tokens = pairs = keys = 0.0
        for chunk in chunks:
            count = chunk.stop - chunk.start
            tokens += count
            pairs += count * (chunk.start + chunk.stop + 1) / 2
            keys += chunk.stop
        return float(np.array([1.0, tokens, pairs, keys]) @ self._coefficients())

    def num_tokens(self, seconds: float, start: int) -> int:
        """Return how many tokens from position `start` on take that long; at least 1.

        The fixed part of the step is not counted. From 16 on they are a multiple of 8.
        """
        _, token, pair, key = self._coefficients()
        slope = token + key + pair * (start + 0.5)
        left = seconds - key * start
        if left <= 0.0:
            return 1
        # pair / 2 * n^2 + slope * n = left, in the form that does not cancel
        root = math.sqrt(slope * slope + 2.0 * pair * left)
        count = int(2.0 * left / (slope + root))
        return max(1, count if count < 2 * _ROWS else count - count % _ROWS)

    def _coefficients(self) -> np.ndarray:
        self._learn()
        if not self._is_fitted:
            self._factors = _fitted(self._products + _TRUST * np.eye(4), self._sums + _TRUST)
            self._is_fitted = True
        return self._unit * self._factors

    def _learn(self) -> None:
        learned, self._learned = self._learned, []  # others may ask for a cost beside a step
        if not learned:
            return
        features = [
            (1, len(positions), (positions + 1).sum(), seq_lens.sum())  # a token sees itself
            for positions, seq_lens, _ in learned
        ]
        expected = np.array(features) * self._unit
        seconds = np.array([its for *_, its in learned])
        rows = expected / np.maximum(seconds, expected.sum(1) / _MOST_SPEEDUP)[:, None]
        weights = _KEPT ** np.arange(len(rows))[::-1]
        kept = _KEPT ** len(rows)
        self._products = self._products * kept + (weights * rows.T) @ rows
        # Each row's target is 1: its seconds over themselves.
        self._sums = self._sums * kept + weights @ rows
        self._is_fitted = False


def _fitted(products: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the least squares of products @ factors = sums with no factor below `_LEAST`.

    Steps of one kind do not tell the parts of their cost from one another, and the best fit may
    have a part that is negative. It becomes the least, and the others are fitted again: else what
    they were to make up for would be predicted on top.
    """
    factors = np.full(len(sums), _LEAST)
    free = np.arange(len(sums))
    while len(free):
        bound = np.delete(np.arange(len(sums)), free)
        rest = sums[free] - products[np.ix_(free, bound)] @ factors[bound]
        found = np.linalg.solve(products[np.ix_(free, free)], rest)
        if (found >= _LEAST).all():
            factors[free] = found
            break
        free = free[found >= _LEAST]
    return factors
