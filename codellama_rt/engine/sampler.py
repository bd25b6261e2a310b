"""Choose the next tokens of all sequences of a step, by one operator (`ops.sample`).

Order of the processors as in vLLM and Transformers: the caller's own, repetition, presence and
frequency penalties, bias, forbidden tokens, then temperature, top-k, top-p, min-p. All arithmetic
in float64. A token depends on its sequence alone, never on the others or on threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codellama_rt import ops
from codellama_rt.engine.logprobs import Logprob, rank_tokens
from codellama_rt.engine.sampling_params import LogitsProcessor, SamplingParams
from codellama_rt.errors import CorruptLogitsError

_MOST_TOP_K = 2**31 - 1


class Choice(NamedTuple):
    """A chosen token, and its log-probability and those of the likeliest ones if asked for."""

    token_id: int
    logprobs: dict[int, Logprob] | None


class Chosen(NamedTuple):
    """What `SamplerRows` has chosen; dictionaries are by the samplers' numbers.

    Attributes:
        token_ids: one per sampler, without a meaning where it has failed.
        array: the same as (num_samplers,) int32.
        failed: what ends a sample alone.
        logprobs: where asked for.
    """

    token_ids: list[int]
    array: np.ndarray
    failed: dict[int, Exception]
    logprobs: dict[int, dict[int, Logprob]]


class Constraint(Protocol):
    """What allows a sequence's next token from outside the sampling parameters: a grammar."""

    def prepare(self) -> None:
        """Begin to compute the next mask in another thread."""

    def accept(self, token_id: int) -> None:
        """Take a chosen token."""

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next; None: all.

        Returns:
            (ceil(vocab_size / 32),) uint32: bit i % 32 of word i // 32 allows token i.

        Raises:
            Exception: it ends this sample alone.
        """


class TokenCounts:
    """The tokens of a sequence, each once, with their counts in the output."""

    def __init__(self, prompt_ids: Collection[int] = ()) -> None:
        """Count the prompt, (prompt_len,) int32."""
        unique = np.unique(np.asarray(prompt_ids, np.int32))
        self.token_ids = array("i", unique.tobytes())
        self.counts = array("i", bytes(unique.nbytes))
        self._places = {token_id: i for i, token_id in enumerate(self.token_ids)}

    def add(self, token_id: int) -> None:
        """Count a new output token."""
        place = self._places.setdefault(token_id, len(self.token_ids))
        if place == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1


class ForbiddenTokens:
    """The tokens of one output that may not come next; everything follows from the tokens so far.

    Attributes:
        allowed: (ceil(vocab_size / 32),) uint32 as of a `Constraint`: the tokens that may come at
            all; None: every one.

    Example:
        >>> forbidden = ForbiddenTokens(4, runs=[[1], [2, 3]])
        >>> forbidden.add(2)
        >>> forbidden.token_ids(), forbidden.allowed
        ([3], array([4294967293], dtype=uint32))
    """

    def __init__(
        self,
        vocab_size: int,
        allowed_ids: Collection[int] | None = None,
        runs: Collection[Sequence[int]] = (),
    ) -> None:
        """Start with an empty output.

        Args:
            vocab_size: of the model.
            allowed_ids: the only tokens that may ever come; None: all.
            runs: of tokens; the last one of each is forbidden after those before it.
        """
        never = [run[-1] for run in runs if len(run) == 1]
        self.allowed = None
        if never or allowed_ids is not None:
            self.allowed = _bit_mask(vocab_size, allowed_ids, never)
        self._runs = [list(run) for run in runs if len(run) > 1]
        self._longest = max((len(run) - 1 for run in self._runs), default=0)
        self._tail: list[int] = []  # of the output, as far as a run looks back

    def add(self, token_id: int) -> None:
        """Take a new output token."""
        self._tail = [*self._tail, token_id][-self._longest :] if self._longest else []

    def token_ids(self) -> list[int]:
        """Return the tokens that would end a run next."""
        return [last for *begin, last in self._runs if self._tail[-len(begin) :] == begin]


def _bit_mask(
    vocab_size: int, allowed_ids: Collection[int] | None, never: Collection[int]
) -> np.ndarray:
    """Return a mask as of a `Constraint`; padding bits are set."""
    bits = np.ones(-(-vocab_size // 32) * 32, bool)
    if allowed_ids is not None:
        bits[:vocab_size] = False
        bits[list(allowed_ids)] = True
    bits[list(never)] = False
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


class TokenSampler:
    """What chooses the tokens of one sample of one request: its parameters and tokens so far."""

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
        constraint: Constraint | None = None,
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
            constraint: for an empty output; is asked for its mask before each token.
            processors: the engine's, called before the request's own.
        """
        self.params, self.name = params, name
        self.key = seed, index
        self.settings = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self.top_k = min(max(params.top_k, 0), _MOST_TOP_K)
        self.counts = None
        if params.counts_tokens:  # tokens of the prompt alone have the repetition penalty only
            self.counts = TokenCounts(prompt_ids if params.repetition_penalty != 1.0 else ())
        bias = params.logit_bias or {}
        self._bias = list(bias.keys()), list(bias.values())
        self._forbidden = ForbiddenTokens(vocab_size, params.allowed_token_ids, bad_runs)
        self._constraint = constraint
        self.processors = (*processors, *params.logits_processors)
        self._end_ids = list(end_ids)
        self.output_ids: list[int] = []
        # What need not be asked for each token of a sampler without it.
        self.may_forbid = bool(bias or bad_runs or params.min_tokens)
        self.has_mask = constraint is not None or self._forbidden.allowed is not None
        self.has_memory = bool(
            bad_runs
            or params.min_tokens
            or constraint is not None
            or self.counts is not None
            or self.processors
        )

    def prepare(self) -> None:
        """Begin to compute, in another thread, what the next token needs besides logits."""
        if self._constraint is not None:
            self._constraint.prepare()

    def record(self, token_id: int) -> None:
        """Record the chosen token, on which the penalties and the rest depend.

        Raises:
            RuntimeError: the grammar exceeded its limits.
        """
        self.output_ids.append(token_id)
        self._forbidden.add(token_id)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    def bias(self) -> tuple[list[int], list[float]]:
        """Return tokens and what is added to their logits now; -inf forbids."""
        forbidden = self._forbidden.token_ids()
        if len(self.output_ids) < self.params.min_tokens:
            forbidden += self._end_ids
        if not forbidden:
            return self._bias
        token_ids, values = self._bias
        return token_ids + forbidden, values + [-np.inf] * len(forbidden)

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next, as a `Constraint` does."""
        allowed = self._forbidden.allowed
        now = None if self._constraint is None else self._constraint.mask()
        if allowed is None or now is None:
            return now if allowed is None else allowed
        return allowed & now


class SamplerRows:
    """The samplers of a step, with those of their parameters that never change as arrays.

    Attributes:
        samplers: of different samples.
    """

    def __init__(self, samplers: Sequence[TokenSampler]) -> None:
        """Read the parameters."""
        self.samplers = list(samplers)
        settings = np.array([s.settings for s in samplers], np.float64).reshape(-1, 6).T.copy()
        keys = np.array([s.key for s in samplers], np.uint64).reshape(-1, 2).T.copy()
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        self._fixed = dict(zip((*names, "frequency_penalty"), settings, strict=True))
        self._fixed |= {
            "seed": keys[0],
            "index": keys[1],
            "top_k": np.array([s.top_k for s in samplers], np.int32),
        }
        self._may_forbid = any(s.may_forbid for s in samplers)
        self._has_masks = any(s.has_mask for s in samplers)
        self._has_counts = any(s.counts is not None for s in samplers)
        self._has_processors = any(s.processors for s in samplers)
        self._rows = np.arange(len(self.samplers), dtype=np.int32)
        self._asked = [i for i, s in enumerate(samplers) if s.params.logprobs is not None]

    def choose(
        self, logits: np.ndarray, positions: Sequence[int], rows: Sequence[int] | None = None
    ) -> Chosen:
        """Choose the token that follows for each sampler; nothing is recorded.

        Args:
            logits: (num_rows, vocab_size) float32, not changed.
            positions: of the new tokens in their sequences.
            rows: each sampler's row of the logits; default: one after another. The samples of one
                prompt share a row.

        Returns:
            The tokens; RuntimeError for a sample whose logits are NaN or infinite or whose tokens
            are all forbidden, or what one of the caller's processors or a constraint has raised.
        """
        samplers, failed = self.samplers, {}
        if not samplers:
            return Chosen([], np.empty(0, np.int32), {}, {})
        rows = self._rows if rows is None else np.array(rows, np.int32)
        sources, source_rows = logits, rows
        if self._has_processors:
            sources = _processed(samplers, logits, positions, rows, failed)
            source_rows = self._rows
        masks, mask_rows = _masks(samplers, failed) if self._has_masks else (None, None)
        sampled = ops.sample(
            sources,
            rows=source_rows,
            position=np.asarray(positions, np.uint64),
            seen=self._seen(),
            bias=self._bias(),
            masks=masks,
            mask_rows=mask_rows,
            **self._fixed,
        )
        token_ids = sampled.token_ids.tolist()
        if not sampled.has_token.all():
            for i in np.flatnonzero(~sampled.has_token).tolist():
                logit = sources[source_rows[i], token_ids[i]]
                failed.setdefault(i, _no_token(samplers[i].name, positions[i], token_ids[i], logit))
        logprobs = self._logprobs(logits, token_ids, rows, failed)
        return Chosen(token_ids, sampled.token_ids, failed, logprobs)

    def _seen(self) -> ops.TokenLists | None:
        if not self._has_counts:
            return None
        counts = [s.counts for s in self.samplers]
        return _joined(
            [((), ()) if c is None else (c.token_ids, c.counts) for c in counts], np.int32
        )

    def _bias(self) -> ops.TokenLists | None:
        if not self._may_forbid:
            return None
        return _joined([s.bias() for s in self.samplers], np.float64)

    def _logprobs(
        self,
        logits: np.ndarray,
        token_ids: list[int],
        rows: np.ndarray,
        failed: dict[int, Exception],
    ) -> dict[int, dict[int, Logprob]]:
        """Return what was asked for by sampler; of the raw logits."""
        asked = [i for i in self._asked if i not in failed]
        if not asked:
            return {}
        num_top = [self.samplers[i].params.logprobs for i in asked]
        chosen = [token_ids[i] for i in asked]
        ranked = rank_tokens(logits, chosen, num_top, rows[asked])
        return {i: tokens.as_dict() for i, tokens in zip(asked, ranked, strict=True)}


def choose(
    samplers: Sequence[TokenSampler],
    logits: np.ndarray,
    positions: Sequence[int],
    rows: Sequence[int] | None = None,
) -> list[Choice | Exception]:
    """Choose once for samplers that do not stay together; arguments as of `SamplerRows.choose`.

    Returns:
        One choice per sampler, or the exception that ends this sample alone.
    """
    chosen = SamplerRows(samplers).choose(logits, positions, rows)
    return [
        chosen.failed[i] if i in chosen.failed else Choice(token_id, chosen.logprobs.get(i))
        for i, token_id in enumerate(chosen.token_ids)
    ]


def _processed(
    samplers: Sequence[TokenSampler],
    logits: np.ndarray,
    positions: Sequence[int],
    rows: np.ndarray,
    failed: dict[int, Exception],
) -> np.ndarray:
    """Apply the caller's processors: return a row of logits per sampler."""
    changed = logits[rows]
    for i, sampler in enumerate(samplers):
        processors = sampler.processors
        best = int(changed[i].argmax())
        if not processors:
            continue
        if not np.isfinite(changed[i, best]):  # not theirs to see
            failed[i] = _no_token(sampler.name, positions[i], best, changed[i, best])
            continue
        try:
            changed[i] = apply_processors(processors, sampler.output_ids, changed[i])
        except Exception as error:
            failed[i] = error
    return changed


def _masks(
    samplers: Sequence[TokenSampler], failed: dict[int, Exception]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the masks of the samplers that have one, and which each has."""
    masks, mask_rows = [], np.full(len(samplers), -1, np.int32)
    for i, sampler in enumerate(samplers):
        try:
            mask = sampler.mask()
        except Exception as error:
            failed.setdefault(i, error)
            continue
        if mask is not None:
            mask_rows[i] = len(masks)
            masks.append(mask)
    return (np.stack(masks), mask_rows) if masks else (None, None)


def _joined(lists: Sequence[tuple[Sequence, Sequence]], dtype: type) -> ops.TokenLists | None:
    """Return lists of (tokens, values) one after another; None if all are empty."""
    sizes = [len(token_ids) for token_ids, _ in lists]
    if not any(sizes):
        return None
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    token_ids, values = (
        np.concatenate(parts, dtype=kind, casting="unsafe")
        for parts, kind in zip(zip(*lists, strict=True), (np.int32, dtype), strict=True)
    )
    return ops.TokenLists(offsets, token_ids, values)


def _no_token(name: str, position: int, best: int, logit: np.floating) -> RuntimeError:
    """Return what to raise where no token can be chosen; a finite logit: all are forbidden."""
    highest = -np.inf if np.isfinite(logit) else logit
    kind = RuntimeError if highest == -np.inf else CorruptLogitsError
    return kind(
        f"request {name!r}: no token to choose at position {position}: the highest "
        f"logit, of token {best}, is {highest}; check the weights "
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
