"""The distribution a token is drawn from: temperature and the cuts, in Transformers' order."""

from __future__ import annotations

import numpy as np

from codellama_rt.hf.generation_config import GenerationConfig
from codellama_rt.ops.reference_sampling import distribution


def warped(scores: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature, top-k, top-p, min-p, typical-p, epsilon and eta.

    Args:
        scores: (vocab_size,) float64 with a finite maximum.
        config: its do_sample is True.

    Returns:
        The tokens that remain, ascending ids, (kept,) int64, and their probabilities, (kept,)
        float64.

    Example:
        >>> config = GenerationConfig(do_sample=True, epsilon_cutoff=0.1)
        >>> warped(np.array([0.0, 3.0, 3.0]), config)
        (array([1, 2]), array([0.5, 0.5]))
    """
    own = config.sampling()
    token_ids, probs = distribution(scores, own.temperature, own.top_k, own.top_p, own.min_p)
    if config.typical_p < 1.0:
        token_ids, probs = _cut(token_ids, probs, _typical(probs, config.typical_p))
    if config.epsilon_cutoff > 0.0:
        token_ids, probs = _cut(token_ids, probs, _above(probs, config.epsilon_cutoff))
    if config.eta_cutoff > 0.0:
        # arXiv:2210.15191, section 3.2: the threshold falls with the entropy.
        entropy = -(probs * np.log(probs)).sum()
        threshold = min(config.eta_cutoff, np.sqrt(config.eta_cutoff) * np.exp(-entropy))
        token_ids, probs = _cut(token_ids, probs, _above(probs, threshold))
    return token_ids, probs


def _cut(
    token_ids: np.ndarray, probs: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return token_ids[kept], probs[kept] / probs[kept].sum()


def _above(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Return the tokens of at least this probability, and always the likeliest."""
    return (probs >= threshold) | (probs == probs.max())


def _typical(probs: np.ndarray, mass: float) -> np.ndarray:
    """Return the tokens with surprise nearest to the entropy, up to `mass` (arXiv:2202.00666)."""
    surprise = -np.log(probs)
    distance = np.abs(surprise - (probs * surprise).sum())
    order = np.argsort(distance, kind="stable")
    last = int((np.cumsum(probs[order]) < mass).sum())
    return distance <= distance[order[min(last, len(order) - 1)]]
