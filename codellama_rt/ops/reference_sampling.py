"""Sampling in NumPy: the definition of `sample` and `token_logprobs`, one row after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codellama_rt.ops.sampling import Sampled, TokenLists, TokenLogprobs

Array = NDArray


def sample(
    logits: Array,
    *,
    rows: Array | None = None,
    seen: TokenLists | None = None,
    bias: TokenLists | None = None,
    masks: Array | None = None,
    mask_rows: Array | None = None,
    **settings: Any,
) -> Sampled:
    """Choose a token for each sample; arguments as of `ops.sample`."""
    rows = np.arange(len(logits)) if rows is None else rows
    if mask_rows is None:
        mask_rows = np.arange(len(rows)) if masks is not None else np.full(len(rows), -1)
    token_ids, has_token = np.empty(len(rows), np.int32), np.empty(len(rows), bool)
    for s, row in enumerate(rows):
        own = {name: value if np.isscalar(value) else value[s] for name, value in settings.items()}
        mask = masks[mask_rows[s]] if mask_rows[s] >= 0 else None
        lists = [_list_of(lists, s) for lists in (seen, bias)]
        token_ids[s], has_token[s] = _choose(logits[row], own, *lists, mask)
    return Sampled(token_ids, has_token)


def _list_of(lists: TokenLists | None, s: int) -> tuple[Array, Array]:
    if lists is None:
        return np.empty(0, np.int32), np.empty(0)
    own = slice(lists.offsets[s], lists.offsets[s + 1])
    return lists.token_ids[own], lists.values[own]


def _choose(
    logits: Array,
    settings: Mapping[str, Any],
    seen: tuple[Array, Array],
    bias: tuple[Array, Array],
    mask: Array | None,
) -> tuple[int, bool]:
    best = int(logits.argmax())  # the first NaN, if there is one
    if not np.isfinite(logits[best]):
        return best, False
    names = "repetition_penalty", "presence_penalty", "frequency_penalty"
    penalties = {name: settings[name] for name in names if name in settings}
    scores = process(logits, seen, bias, mask, **penalties)
    best = int(scores.argmax())
    if not np.isfinite(scores[best]) or settings.get("temperature", 1.0) == 0.0:
        return best, bool(np.isfinite(scores[best]))
    cuts = {n: settings[n] for n in ("temperature", "top_k", "top_p", "min_p") if n in settings}
    key = (int(settings.get(name, 0)) for name in ("seed", "index", "position"))
    return draw(*distribution(scores, **cuts), uniform(*key)), True


def process(
    logits: Array,
    seen: tuple[Array, Array],
    bias: tuple[Array, Array],
    mask: Array | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Array:
    """Apply what does not depend on the other tokens' scores: penalties, bias, mask.

    Args:
        logits: (vocab_size,) float32, not changed.
        seen: the tokens so far, each once, and their counts in the output.
        bias: tokens and what is added to their scores.
        mask: (ceil(vocab_size / 32),) uint32 of allowed tokens; None: all.
        repetition_penalty: of seen tokens.
        presence_penalty: of tokens of the output.
        frequency_penalty: of each occurrence in the output.

    Returns:
        (vocab_size,) float64.
    """
    scores = logits.astype(np.float64)
    token_ids, counts = seen
    old = scores[token_ids]
    old = np.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    scores[token_ids] = old - presence_penalty * (counts > 0) - frequency_penalty * counts
    np.add.at(scores, *bias)
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(scores)]
        scores[allowed == 0] = -np.inf
    return scores


def distribution(
    scores: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Array, Array]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        scores: (vocab_size,) float64 with a finite maximum.
        temperature: above 0.
        top_k: 0 or less: all.
        top_p: the mass of the nucleus.
        min_p: relative to the likeliest token.

    Returns:
        The ids of the remaining tokens, ascending, (kept,) int64, and their probabilities, (kept,)
        float64, all positive.
    """
    token_ids = np.flatnonzero(scores > -np.inf)
    if 0 < top_k < len(token_ids):
        kth = np.partition(scores, -top_k)[-top_k]
        token_ids = np.flatnonzero(scores >= kth)  # ties with the k-th stay, as in Transformers
    scores = scores[token_ids]
    with np.errstate(over="ignore", under="ignore"):
        # Subtracting the maximum first keeps a tiny temperature from overflowing to NaN.
        weights = np.exp((scores - scores.max()) / temperature)
    kept = weights > 0
    if top_p < 1.0:
        kept &= _nucleus(weights, top_p * weights.sum())
    if min_p > 0.0:
        kept &= weights >= min_p  # of the likeliest one's, which is 1
    token_ids, weights = token_ids[kept], weights[kept]
    return token_ids, weights / weights.sum()


def _nucleus(weights: Array, mass: float) -> Array:
    """Return which weights have at most `mass` before them; ties: the lower id goes first."""
    # Weights below the bound sum to less than what is left out, so none of them can be kept. On a
    # real model's logits this leaves a few hundred to sort instead of the whole vocabulary.
    candidates = weights[weights >= (weights.sum() - mass) / len(weights)]
    ordered = np.sort(candidates)[::-1]  # values only: ten times faster than a stable argsort
    before = np.concatenate(([0.0], np.cumsum(ordered)[:-1]))
    num_kept = int(np.searchsorted(before, mass, side="right"))
    last = ordered[num_kept - 1]
    kept = weights > last
    kept[np.flatnonzero(weights == last)[: num_kept - int(kept.sum())]] = True
    return kept


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1) that is a pure function of the three arguments.

    Philox4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011): key = seed and sample index, counter = position.
    """
    bits = np.random.Philox(key=index << 64 | seed, counter=position).random_raw()
    return (bits >> 11) * 2.0**-53


def draw(token_ids: Array, probs: Array, u: float) -> int:
    """Invert the cumulative distribution over tokens in ascending order of their ids.

    Args:
        token_ids: (kept,) int64.
        probs: (kept,) float64, positive.
        u: in [0, 1).
    """
    cumulative = np.cumsum(probs)
    i = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(token_ids[min(i, len(token_ids) - 1)])  # u * total may round up to the total


def token_logprobs(
    logits: Array, token_ids: Array, num_top: int = 0, *, rows: Array | None = None
) -> TokenLogprobs:
    """Return log-probabilities and ranks; arguments as of `ops.token_logprobs`."""
    rows = np.arange(len(token_ids)) if rows is None else rows
    logprobs, ranks = np.empty((len(rows), 1 + num_top)), np.empty(len(rows), np.int32)
    top_ids = np.full((len(rows), num_top), -1, np.int32)
    for t, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
        x = logits[row].astype(np.float64)
        order = np.argsort(-x, kind="stable")
        ranks[t] = 1 + np.flatnonzero(order == token_id)[0]
        log_total = x.max() + np.log(np.exp(x - x.max()).sum())
        top = order[:num_top]
        top_ids[t, : len(top)] = top
        logprobs[t] = np.nan
        logprobs[t, : 1 + len(top)] = x[[token_id, *top]] - log_total
    return TokenLogprobs(logprobs, ranks, top_ids)
