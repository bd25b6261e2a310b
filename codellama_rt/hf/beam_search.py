"""Beam search like `_beam_search` in Transformers 4.57, one prompt at a time.

The best continuations of all beams are kept, or, when sampling, some that are drawn without
replacement. One that ends is a result if it is among the num_beams first of its step; its score is
its log-probability / length ** length_penalty. Tokens that a processor forbids are never taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codellama_rt.engine.branches import Branch, Branches
from codellama_rt.engine.stop_strings import TextStream
from codellama_rt.hf.search import Found, Search, nothing_allowed
from codellama_rt.hf.warping import warped


class _Beam(NamedTuple):
    token_ids: tuple[int, ...]  # after the prompt
    log_prob: float  # their sum
    origins: tuple[int, ...]  # the beam that each token came from


class _Result(NamedTuple):
    score: float
    beam: _Beam


def beam_search(search: Search, branches: Branches) -> Found:
    """Run a search whose configuration has several beams.

    Returns:
        num_return_sequences results per prompt, best first.

    Raises:
        ValueError: the processors leave no token, or fewer continuations than asked for.
    """
    count = search.config.num_return_sequences
    searches = [_PromptSearch(search, branches, i) for i in range(len(search.prompts))]
    found = Found([], [], sequences_scores=[], beams=[])
    for step in range(search.max_new_tokens):
        going = [one for one in searches if not one.is_done]
        if not going:
            break
        _record(search, found, searches, [one.expand() for one in going], going)
        for one in going:
            one.select(is_last=step + 1 == search.max_new_tokens)
    for i, one in enumerate(searches):
        if len(one.results) < count:
            raise ValueError(
                f"the processors leave {len(one.results)} continuations of prompt {i}, and "
                f"num_return_sequences={count}"
            )
        for result in one.results[:count]:
            found.rows.append(list(result.beam.token_ids))
            found.parents.append(i)
            found.sequences_scores.append(result.score)
            found.beams.append([i * search.config.num_beams + o for o in result.beam.origins])
    return found


def _record(
    search: Search,
    found: Found,
    searches: list[_PromptSearch],
    expanded: list[tuple[np.ndarray, np.ndarray]],
    going: list[_PromptSearch],
) -> None:
    """Keep a step's arrays, with zeros for prompts whose search is over."""
    if not (search.config.output_scores or search.config.output_logits):
        return
    by_search = {id(one): arrays for one, arrays in zip(going, expanded, strict=True)}
    blank = tuple(np.zeros_like(array) for array in expanded[0])
    arrays = [by_search.get(id(one), blank) for one in searches]
    found.record(search.config, *(np.concatenate(each) for each in zip(*arrays, strict=True)))


class _PromptSearch:
    """The beams of one prompt."""

    def __init__(self, search: Search, branches: Branches, index: int) -> None:
        self._search, self._branches = search, branches
        self._prompt, self._ends = search.prompts[index], search.ends[index]
        self._padded, self._index = search.padded[index], index
        self._room = search.max_model_len - len(self._prompt)
        n_beams = search.config.num_beams
        # At first all beams are the same; only the first is continued.
        self._beams = [_Beam((), 0.0 if i == 0 else -np.inf, ()) for i in range(n_beams)]
        first = branches.add(self._prompt, search.adapter)
        self._live: list[Branch] = [first]
        self._scores = np.zeros(0)
        self.results: list[_Result] = []
        self.is_done = False

    def expand(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute what may follow each beam: (logits, processed log-probabilities)."""
        n_beams = self._search.config.num_beams
        logits = self._branches.logits(self._live)
        if len(logits) < n_beams:  # all beams are still the prompt
            logits = np.repeat(logits, n_beams, axis=0)
        log_probs = _log_softmax(logits)
        input_ids = np.array([[*self._padded, *beam.token_ids] for beam in self._beams])
        processed = self._search.processed([self._index] * n_beams, input_ids, log_probs)
        if self._draws:
            processed = np.stack([self._warped(row) for row in processed])
        self._scores = processed + np.array([[beam.log_prob] for beam in self._beams])
        return logits, processed

    def select(self, is_last: bool) -> None:
        """Choose the beams of the next step, and the results of this one.

        Raises:
            ValueError: nothing is allowed to come next, and nothing has ended before.
        """
        n_beams = self._search.config.num_beams
        candidates = self._candidates(n_beams * max(2, 1 + len(self._ends)))
        if not candidates and not self.results:
            raise nothing_allowed(float(self._scores.max()))
        ending = self._ending(candidates, is_last) if candidates else ()
        going = [beam for beam, ends in zip(candidates, ending, strict=True) if not ends]
        going = sorted(going, key=lambda beam: -beam.log_prob)[:n_beams]
        ended = [beam for beam, ends in zip(candidates[:n_beams], ending, strict=False) if ends]
        self.results += [_Result(self._score(beam), beam) for beam in ended]
        self.results.sort(key=lambda result: -result.score)
        del self.results[n_beams:]
        self.is_done = not going or self._is_settled(going)
        if self.is_done:
            for branch in self._live:
                self._branches.drop(branch)
        else:
            # Where the processors leave too few, what fills the beams can have no continuation.
            missing = n_beams - len(going)
            self._follow(going + [going[-1]._replace(log_prob=-np.inf)] * missing)

    @property
    def _draws(self) -> bool:
        config = self._search.config
        return config.do_sample and config.temperature > 0.0

    def _warped(self, scores: np.ndarray) -> np.ndarray:
        """Divide by the temperature and forbid what the cuts leave out; (vocab_size,)."""
        cut = np.full_like(scores, -np.inf)
        if scores.max() > -np.inf:
            kept, _ = warped(scores, self._search.config)
            cut[kept] = scores[kept] / self._search.config.temperature
        return cut

    def _candidates(self, count: int) -> list[_Beam]:
        """Return the best continuations, best first; ties: the lower beam and token go first.

        When sampling, return as many that are drawn, in the order of their draws.
        """
        vocab_size = self._scores.shape[1]
        flat = self._scores.reshape(-1)
        allowed = np.flatnonzero(flat > -np.inf)
        if not allowed.size:
            return []
        keys = -flat[allowed]
        if self._draws:
            position = len(self._prompt) + len(self._beams[0].token_ids)
            keys -= _gumbel(self._search.seed + self._index, position, len(keys))
        count = min(count, len(keys))
        best = np.argpartition(keys, count - 1)[:count]
        best = allowed[best[np.lexsort((best, keys[best]))]]
        return [
            _Beam(
                (*self._beams[i // vocab_size].token_ids, int(i % vocab_size)),
                float(flat[i]),
                (*self._beams[i // vocab_size].origins, int(i // vocab_size)),
            )
            for i in best
        ]

    def _ending(self, candidates: list[_Beam], is_last: bool) -> np.ndarray:
        length = len(candidates[0].token_ids)
        if is_last or length >= self._room:
            return np.ones(len(candidates), bool)
        rows = np.array([[*self._padded, *beam.token_ids] for beam in candidates])
        ending = self._search.stopped(rows, None)
        for i, beam in enumerate(candidates):
            ending[i] |= beam.token_ids[-1] in self._ends or self._has_stop_string(beam)
        return ending

    def _has_stop_string(self, beam: _Beam) -> bool:
        watch: TextStream | None = self._search.text_watch(self._prompt)
        if watch is None:
            return False
        return any(watch.push(token_id)[1] is not None for token_id in beam.token_ids)

    def _score(self, beam: _Beam) -> float:
        return beam.log_prob / len(beam.token_ids) ** self._search.config.length_penalty

    def _is_settled(self, going: list[_Beam]) -> bool:
        """Return whether no later step can change the results."""
        config = self._search.config
        if len(self.results) < config.num_beams:
            return False
        if config.early_stopping is True:
            return True
        # The score that the best beam would get if it ended without further loss.
        length = len(going[0].token_ids)
        if config.early_stopping == "never" and config.length_penalty > 0.0:
            length = min(self._search.max_new_tokens, self._room)
        return going[0].log_prob / length**config.length_penalty <= self.results[-1].score

    def _follow(self, going: list[_Beam]) -> None:
        """Let the branches follow their beams.

        Blocks of beams that end here are freed; beams that continue twice share theirs.
        """
        parents = [beam.origins[-1] if len(self._live) > 1 else 0 for beam in going]
        children = [self._branches.fork(self._live[parent]) for parent in parents]
        for branch in self._live:
            self._branches.drop(branch)
        for branch, beam in zip(children, going, strict=True):
            self._branches.append(branch, beam.token_ids[-1])
        self._beams, self._live = going, children


def _gumbel(seed: int, position: int, count: int) -> np.ndarray:
    """Return noise that depends on the arguments alone; (count,) float64.

    Adding it to log-probabilities and taking the k highest draws k without replacement (Kool et
    al., "Stochastic beams and where to find them", ICML 2019, section 2.3).
    """
    # A position has 2^64 numbers of its own.
    bits = np.random.Philox(key=seed, counter=position << 64).random_raw(count)
    return -np.log(-np.log(((bits >> np.uint64(11)) + 0.5) * 2.0**-53))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
