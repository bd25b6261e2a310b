"""Choose a token from a row of logits; every function is pure in its arguments.

Order of the processors as in vLLM and Transformers: the caller's own, repetition, presence and
frequency penalties, bias, forbidden tokens, then temperature, top-k, top-p, min-p. All arithmetic
in float64.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np

from codellama_rt.engine.grammar import GrammarState
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams


class TokenCounts:
    """The tokens of a sequence with their counts, updated token by token."""

    def __init__(self, prompt_ids: Collection[int], vocab_size: int) -> None:
        """Count the prompt.

        Args:
            prompt_ids: int32 (prompt_len,).
            vocab_size: length of the two tables.
        """
        self.in_output = np.zeros(vocab_size, np.int32)  # occurrences
        self.seen = np.zeros(vocab_size, bool)  # in the prompt or the output
        self.seen[np.asarray(prompt_ids, np.int64)] = True

    def add(self, token_id: int) -> None:
        """Count a new output token."""
        self.in_output[token_id] += 1
        self.seen[token_id] = True


class ForbiddenTokens:
    """The tokens of one output that may not come next; everything follows from the tokens so far.

    Example:
        >>> forbidden = ForbiddenTokens(4, runs=[[1], [2, 3]])
        >>> forbidden.add(2)
        >>> np.flatnonzero(forbidden.mask())
        array([1, 3])
    """

    def __init__(
        self,
        vocab_size: int,
        allowed_ids: Collection[int] | None = None,
        runs: Collection[Sequence[int]] = (),
    ) -> None:
        """Start with an empty output.

        Args:
            vocab_size: length of the masks.
            allowed_ids: the only tokens that may ever come; None: all.
            runs: of tokens; the last one of each is forbidden after those before it.
        """
        self._always = np.full(vocab_size, allowed_ids is not None)
        if allowed_ids is not None:
            self._always[list(allowed_ids)] = False
        self._always[[run[-1] for run in runs if len(run) == 1]] = True
        self._runs = [list(run) for run in runs if len(run) > 1]
        self._longest = max((len(run) - 1 for run in self._runs), default=0)
        self._tail: list[int] = []  # of the output, as far as a run looks back

    def add(self, token_id: int) -> None:
        """Take a new output token."""
        self._tail = [*self._tail, token_id][-self._longest :] if self._longest else []

    def mask(self) -> np.ndarray:
        """Return which tokens may not come next, (vocab_size,) bool."""
        mask = self._always.copy()
        for *begin, last in self._runs:
            mask[last] |= self._tail[-len(begin) :] == begin
        return mask


class TokenSampler:
    """Choose the tokens of one sample of one request."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        index: int,
        prompt_ids: Collection[int],
        vocab_size: int,
        end_ids: Collection[int] = (),
        name: str = "",
        bad_runs: Collection[Sequence[int]] = (),
        grammar: GrammarState | None = None,
        processors: Collection[LogitsProcessor] = (),
    ) -> None:
        """Start after the prompt.

        Args:
            params: what the caller asked for.
            seed: of the request; draws depend only on it, on `index` and on the position.
            index: which of the request's n samples.
            prompt_ids: int32 (prompt_len,).
            vocab_size: of the model.
            end_ids: tokens that would end the output; masked until `min_tokens`.
            name: of the request, for messages.
            bad_runs: the tokens of `bad_words`.
            grammar: of `structured_outputs`, for an empty output.
            processors: the engine's, called before the request's own.
        """
        self._params, self._seed, self._index, self._name = params, seed, index, name
        self._counts = TokenCounts(prompt_ids, vocab_size) if params.counts_tokens else None
        self._forbidden = None
        if bad_runs or params.allowed_token_ids is not None:
            self._forbidden = ForbiddenTokens(vocab_size, params.allowed_token_ids, bad_runs)
        self._output_ids: list[int] = []
        self._end_ids = list(end_ids)
        self._grammar = grammar
        self._processors = (*processors, *params.logits_processors)
        changes = {self._counts, self._forbidden, grammar}
        self._reads_raw_logits = params.is_greedy and changes == {None} and not params.logit_bias

    def prepare(self) -> None:
        """Begin to compute, in another thread, what the next token needs besides logits."""
        if self._grammar is not None:
            self._grammar.prepare()

    def sample(self, logits: np.ndarray, position: int, num_generated: int) -> int:
        """Choose the token that follows.

        Args:
            logits: (vocab_size,) float32, not changed.
            position: of the new token in its sequence.
            num_generated: output tokens before it.

        Raises:
            RuntimeError: the logits are NaN or infinite, every token is masked, or the grammar
                exceeded its limits.
            Exception: of one of the caller's processors.
        """
        best = int(logits.argmax())  # the first NaN, if any: one pass finds both
        self._require_finite(logits, best, position)
        if self._processors:
            logits = apply_processors(self._processors, self._output_ids, logits)
            best = int(logits.argmax())
            self._require_finite(logits, best, position)
        masked = num_generated < self._params.min_tokens
        if self._reads_raw_logits and not masked:
            return best
        end_ids = self._end_ids if masked else ()
        processed = process_logits(logits, self._params, self._counts, end_ids)
        if self._forbidden is not None:
            processed[self._forbidden.mask()] = -np.inf
        if self._grammar is not None:
            allowed = self._grammar.mask().view(np.uint8)
            allowed = np.unpackbits(allowed, count=len(logits), bitorder="little")
            processed[allowed == 0] = -np.inf
        best = int(processed.argmax())
        self._require_finite(processed, best, position)
        if self._params.is_greedy:
            return best
        token_ids, probs = distribution(processed, self._params)
        return draw(token_ids, probs, uniform(self._seed, self._index, position))

    def record(self, token_id: int) -> None:
        """Record the chosen token, on which the penalties and the rest depend."""
        self._output_ids.append(token_id)
        if self._counts is not None:
            self._counts.add(token_id)
        if self._forbidden is not None:
            self._forbidden.add(token_id)
        if self._grammar is not None:
            self._grammar.accept(token_id)

    def _require_finite(self, logits: np.ndarray, best: int, position: int) -> None:
        if not math.isfinite(logits[best]):
            raise RuntimeError(
                f"request {self._name!r}: no token to choose at position {position}: the highest "
                f"logit, of token {best}, is {logits[best]}; check the weights "
                "(open_checkpoint(..., check='finite')), logit_bias, allowed_token_ids, "
                "bad_words, logits_processors, stop_token_ids, structured_outputs and min_tokens"
            )


def apply_processors(
    processors: Collection[LogitsProcessor], output_ids: Sequence[int], logits: np.ndarray
) -> np.ndarray:
    """Apply the caller's processors one after another.

    Args:
        processors: each is called with a list of the output's tokens and a copy of the logits.
        output_ids: tokens of the output so far.
        logits: (vocab_size,) float32, not changed.

    Returns:
        (vocab_size,) float32.

    Raises:
        TypeError, ValueError: a processor returned something else.
        Exception: what a processor raised.
    """
    for processor in processors:
        changed = processor(list(output_ids), logits.copy())
        changed = changed.asnumpy() if hasattr(changed, "asnumpy") else np.asarray(changed)
        name = f"logits_processors: {processor!r:.60} must return"
        if changed.dtype.kind not in "fiu":
            raise TypeError(f"{name} numbers, got {changed.dtype}")
        if changed.shape != logits.shape:
            raise ValueError(f"{name} logits of shape {logits.shape}, got {changed.shape}")
        logits = changed.astype(np.float32)
    return logits


def process_logits(
    logits: np.ndarray,
    params: SamplingParams,
    counts: TokenCounts | None = None,
    masked_ids: Collection[int] = (),
) -> np.ndarray:
    """Apply what depends on the tokens so far: penalties, bias, minimum length.

    Args:
        logits: (vocab_size,) float32, not changed.
        params: with the penalties and the bias.
        counts: the tokens so far; None when no penalty is set.
        masked_ids: tokens that must not be chosen.

    Returns:
        (vocab_size,) float64.
    """
    logits = logits.astype(np.float64)
    if counts is not None:
        penalty = params.repetition_penalty
        seen = logits[counts.seen]
        logits[counts.seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        logits -= params.presence_penalty * (counts.in_output > 0)
        logits -= params.frequency_penalty * counts.in_output
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64)
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float64)
    if masked_ids:
        logits[list(masked_ids)] = -np.inf
    return logits


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: (vocab_size,) float64 with a finite maximum.
        params: with a temperature above 0.

    Returns:
        The ids of the remaining tokens, ascending, (kept,) int64, and their probabilities, (kept,)
        float64, all positive.
    """
    token_ids = np.flatnonzero(logits > -np.inf)
    if 0 < params.top_k < len(token_ids):
        kth = np.partition(logits, -params.top_k)[-params.top_k]
        token_ids = np.flatnonzero(logits >= kth)  # ties with the k-th stay, as in Transformers
    scores = logits[token_ids]
    with np.errstate(over="ignore", under="ignore"):
        # Subtracting the maximum first keeps a tiny temperature from overflowing to NaN.
        probs = np.exp((scores - scores.max()) / params.temperature)
    probs /= probs.sum()
    kept = probs > 0
    if params.top_p < 1.0:
        kept &= _nucleus(probs, params.top_p)
    if params.min_p > 0.0:
        kept &= probs >= params.min_p * probs.max()
    token_ids, probs = token_ids[kept], probs[kept]
    return token_ids, probs / probs.sum()


def _nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Return which tokens have at most `top_p` before them; ties: the lower id goes first."""
    # Tokens below (1 - p) / size sum to less than 1 - p, so none of them can be kept. On a real
    # model's logits this leaves a few hundred to sort instead of the whole vocabulary.
    candidates = probs[probs >= (1.0 - top_p) / len(probs)]
    ordered = np.sort(candidates)[::-1]  # values only: ten times faster than a stable argsort
    before = np.concatenate(([0.0], np.cumsum(ordered)[:-1]))
    num_kept = int(np.searchsorted(before, top_p, side="right"))
    last = ordered[num_kept - 1]
    kept = probs > last
    kept[np.flatnonzero(probs == last)[: num_kept - int(kept.sum())]] = True
    return kept


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1) that is a pure function of the three arguments.

    Philox4x64-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011): key = seed and sample index, counter = position.
    """
    bits = np.random.Philox(key=index << 64 | seed, counter=position).random_raw()
    return (bits >> 11) * 2.0**-53


def draw(token_ids: np.ndarray, probs: np.ndarray, u: float) -> int:
    """Invert the cumulative distribution over tokens in ascending order of their ids.

    Args:
        token_ids: (kept,) int64.
        probs: (kept,) float64, positive.
        u: in [0, 1).
    """
    cumulative = np.cumsum(probs)
    i = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(token_ids[min(i, len(token_ids) - 1)])  # u * total may round up to the total


def probabilities(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Collection[int] = (),
    output_ids: Collection[int] = (),
) -> np.ndarray:
    """Return the distribution the next token is drawn from.

    Args:
        logits: (vocab_size,) float32.
        params: all processors; temperature 0 gives the greedy token probability 1.
        prompt_ids: int32 (prompt_len,).
        output_ids: int32 (num_generated,).

    Returns:
        (vocab_size,) float64.

    Example:
        >>> probabilities(np.float32([0, 1, 2]), SamplingParams(temperature=1, top_k=2)).round(3)
        array([0.   , 0.269, 0.731])
    """
    counts = TokenCounts(prompt_ids, len(logits))
    for token_id in output_ids:
        counts.add(token_id)
    processed = process_logits(logits, params, counts)
    probs = np.zeros(len(logits))
    if params.is_greedy:
        probs[processed.argmax()] = 1.0
    else:
        token_ids, kept = distribution(processed, params)
        probs[token_ids] = kept
    return probs
