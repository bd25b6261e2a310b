"""How long a step takes: a model of four numbers that learns from the steps of this machine.

    seconds = fixed + a * tokens + b * sum(tokens x keys they see) + c * sum(keys)

The fixed part reads the weights, `a` multiplies by them, `b` is the arithmetic of attention and `c`
reads the cache. They are fitted by ridge regression to the relative errors of the last steps: one
that took ten times as long, because a file was read for the first time, counts for a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from operator import mul
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
_KEPT = 0.98  # of older steps' weight per step: the last 50 count
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

    @property
    def fixed(self) -> float:
        """Seconds of a step, however few tokens it has."""
        return float(self._coefficients()[0])

    def parts(self) -> tuple[float, float, float, float]:
        """Return the seconds of a step, of a token's products, of a token and a key, of a key."""
        fixed, token, pair, key = self._coefficients().tolist()
        return fixed, token, pair, key

    def learn(self, chunks: Collection[Tokens], seconds: float) -> None:
        """Take a step that has been computed into account."""
        row = self._features(chunks) * self._unit / seconds
        self._products = self._products * _KEPT + np.outer(row, row)
        self._sums = self._sums * _KEPT + row  # each row's target is 1: its seconds over themselves
        self._is_fitted = False

    def seconds(self, chunks: Collection[Tokens]) -> float:
        """Return how long a step of these chunks takes, the fixed part included."""
        return float(self._features(chunks) @ self._coefficients())

    def num_tokens(self, seconds: float, start: int) -> int:
        """Return how many tokens from position `start` on take that long; at least 1.

        The fixed part of the step is not counted.
        """
        _, token, pair, key = self._coefficients()
        slope = token + key + pair * (start + 0.5)
        left = seconds - key * start
        if left <= 0.0:
            return 1
        # pair / 2 * n^2 + slope * n = left, in the form that does not cancel
        root = math.sqrt(slope * slope + 2.0 * pair * left)
        return max(1, int(2.0 * left / (slope + root)))

    def _coefficients(self) -> np.ndarray:
        if not self._is_fitted:
            factors = np.linalg.solve(self._products + _TRUST * np.eye(4), self._sums + _TRUST)
            self._factors = np.maximum(factors, _LEAST)
            self._is_fitted = True
        return self._unit * self._factors

    def _features(self, chunks: Collection[Tokens]) -> np.ndarray:
        starts, stops = [chunk.start for chunk in chunks], [chunk.stop for chunk in chunks]
        keys = sum(stops)
        # A token sees the keys up to its own: start + 1 to stop of them, added up by both ends.
        pairs = sum(map(mul, stops, stops)) + keys - sum(map(mul, starts, starts)) - sum(starts)
        return np.array([1.0, keys - sum(starts), pairs / 2, keys])
