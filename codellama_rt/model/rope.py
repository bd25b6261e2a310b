"""Rotary position embedding: cos/sin tables of the very angles the models were trained with.

Meta's code and Transformers compute frequencies and angles in float32. At position 100,000 that
rounds an angle by up to 0.004 rad, which moves logits in the second decimal: a runtime with exact
angles gives other logits than the reference. So frequencies and angles are rounded as theirs are,
step by step, and only the cosine and sine of such an angle are computed in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from codellama_rt.model.config import ModelConfig, RopeScaling

_FILL_ROWS = 4096  # rows computed at once as a sequence grows: 10 ms, once every 4096 tokens
_MAX_RESERVED_ROWS = 131072


def inverse_frequencies(config: ModelConfig, length: int | None = None) -> tuple[np.ndarray, float]:
    """Compute the angle a position adds for each pair, as transformers 4.57 does, in float32.

    Args:
        config: the model; its rope_theta, head_dim and rope_scaling are used.
        length: length of the sequence in tokens, which "dynamic" and "longrope" depend on.

    Returns:
        The inverse frequencies, float32 (head_dim / 2), and the factor for cos and sin (yarn and
        longrope).

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, dim=4,
        ...                      hidden_dim=4, vocab_size=4)
        >>> inverse_frequencies(config)[0]
        array([1.  , 0.01], dtype=float32)
    """
    scaling = config.rope_scaling
    if scaling is None:
        return _unscaled(config.rope_theta, config.head_dim), 1.0
    if scaling.kind == "dynamic":
        return _dynamic(config, scaling, length), 1.0
    frequencies = _unscaled(config.rope_theta, config.head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, config, scaling), _yarn_attention_factor(scaling)
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "longrope":
        return _longrope(config, scaling, length), scaling.attention_factor
    assert scaling.kind == "factors", scaling.kind
    return frequencies / np.asarray(scaling.frequency_factors, np.float32), 1.0


def _unscaled(theta: float, head_dim: int) -> np.ndarray:
    return np.float32(1.0) / _powers(theta, head_dim)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A power in float64, rounded: float32 powers differ by a unit from one library to the next.
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def _longrope(config: ModelConfig, scaling: RopeScaling, length: int | None) -> np.ndarray:
    """Divide by factors of their own for sequences that exceed the original length."""
    is_long = config.rope_class(length or 0) > 0
    factors = scaling.long_factors if is_long else scaling.frequency_factors
    powers = _powers(config.rope_theta, config.head_dim)
    return np.float32(1.0) / (np.asarray(factors, np.float32) * powers)


def _dynamic(config: ModelConfig, scaling: RopeScaling, length: int | None) -> np.ndarray:
    """Scale NTK-aware: the base grows with the length once that exceeds the trained one."""
    trained, dim = config.max_position_embeddings, config.head_dim
    stretch = scaling.factor * max(length or trained, trained) / trained - (scaling.factor - 1.0)
    return _unscaled(config.rope_theta * stretch ** (dim / (dim - 2)), dim)


def _yarn(frequencies: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Blend stretched and original frequencies by a ramp (arXiv:2309.00071, section 3.2)."""
    dim, original = config.head_dim, scaling.original_max_position_embeddings
    assert original is not None

    def pair_that_turns(rotations: float) -> float:
        return (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: a step instead of a division by zero
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    stretched = np.clip(ramp, np.float32(0.0), np.float32(1.0))
    return frequencies / scaling.factor * stretched + frequencies * (1.0 - stretched)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, and blend those between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    wavelengths = 2 * math.pi / frequencies
    kept = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return frequencies / scaling.factor * (1.0 - kept) + frequencies * kept


def table_bytes(config: ModelConfig, length: int) -> int:
    """Return the bytes that the tables take once a sequence has had `length` tokens.

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, dim=4,
        ...                      hidden_dim=4, vocab_size=4)
        >>> table_bytes(config, 1)
        65536
    """
    rows = -(-length // _FILL_ROWS) * _FILL_ROWS
    return 2 * rows * (config.head_dim // 2) * np.dtype(np.float32).itemsize


class RotaryEmbedding:
    """The rotation of each position, from one table that grows with the longest sequence.

    Rows already computed never change, and up to max_position_embeddings (131,072 at most) the
    table stays at its address: its memory is reserved at once and touched only when filled. Threads
    that fill it at the same time write the same bits, and each uses the table that it has filled.

    Args:
        config: the model.

    Example:
        >>> config = ModelConfig(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, dim=4,
        ...                      hidden_dim=4, vocab_size=4)
        >>> cos, sin, index = RotaryEmbedding(config).lookup(np.array([0, 7], np.int32))
        >>> cos[index][1].round(3)
        array([0.754, 0.998], dtype=float32)
    """

    def __init__(self, config: ModelConfig):
        """Compute the frequencies; the tables are filled on the first lookup."""
        self.config = config
        self.is_dynamic = config.rope_scaling is not None and config.rope_scaling.depends_on_length
        self._frequencies, self._attention_factor = inverse_frequencies(config)
        no_rows = np.empty((0, config.head_dim // 2), np.float32)
        self._table = _Table(no_rows, no_rows, 0)

    def lookup(
        self, positions: np.ndarray, rope_lengths: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tables and, for each token, the row of them that holds its rotation.

        Args:
            positions: int32 (num_tokens), each from 0.
            rope_lengths: int32 (num_tokens), the length each token was computed at, that is
                max(tokens in its prompt, its position + 1); needed only when `is_dynamic`.

        Returns:
            cos and sin, float32 (rows, head_dim / 2), and index, int32 (num_tokens). For dynamic
            scaling the rows are the tokens' own, otherwise index is `positions`.

        Raises:
            ValueError: dynamic scaling without rope_lengths.
        """
        assert positions.dtype == np.int32, positions.dtype
        assert positions.ndim == 1, positions.shape
        if self.is_dynamic:
            return self._lookup_dynamic(positions, rope_lengths)
        length = 0
        if positions.size:
            assert positions.min() >= 0, "negative position"
            length = int(positions.max()) + 1
        table = self._filled(length)
        return table.cos[: table.num_rows], table.sin[: table.num_rows], positions

    def _lookup_dynamic(
        self, positions: np.ndarray, rope_lengths: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if rope_lengths is None:
            raise ValueError(
                "RotaryEmbedding.lookup: rope_lengths must be int32 (num_tokens) for dynamic rope "
                "scaling, "
                "got None; pass max(prompt length, position + 1) of each token"
            )
        if self.config.rope_scaling.kind == "longrope":  # one length stands for all longer ones
            rope_lengths = np.minimum(
                rope_lengths, self.config.rope_scaling.original_max_position_embeddings + 1
            )
        lengths, which = np.unique(rope_lengths, return_inverse=True)
        frequencies = np.stack(
            [inverse_frequencies(self.config, int(n))[0] for n in lengths] or [self._frequencies]
        )
        cos, sin = self._rotations(positions, frequencies[which])
        return cos, sin, np.arange(positions.size, dtype=np.int32)

    def _rotations(
        self, positions: np.ndarray, frequencies: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute cos and sin, float32 (len(positions), head_dim / 2), of float32 angles."""
        angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
        cos, sin = np.cos(angles), np.sin(angles)
        if self._attention_factor != 1.0:
            cos *= self._attention_factor
            sin *= self._attention_factor
        return cos.astype(np.float32), sin.astype(np.float32)

    def _filled(self, length: int) -> _Table:
        """Return a table that holds positions below `length`."""
        table = self._table
        if length <= table.num_rows:
            return table
        num_rows = -(-length // _FILL_ROWS) * _FILL_ROWS
        cos, sin, first = table.cos, table.sin, table.num_rows
        if num_rows > len(cos):
            reserved = min(self.config.max_position_embeddings, _MAX_RESERVED_ROWS)
            capacity = max(num_rows, reserved, 2 * len(cos))
            cos, sin = _grown(cos[:first], capacity), _grown(sin[:first], capacity)
        rotations = self._rotations(np.arange(first, num_rows), self._frequencies)
        cos[first:num_rows], sin[first:num_rows] = rotations
        self._table = table = _Table(cos, sin, num_rows)
        return table


class _Table(NamedTuple):
    cos: np.ndarray  # float32 (capacity, head_dim / 2)
    sin: np.ndarray
    num_rows: int  # filled ones


def _grown(rows: np.ndarray, capacity: int) -> np.ndarray:
    table = np.empty((capacity, rows.shape[1]), np.float32)
    table[: len(rows)] = rows
    return table
