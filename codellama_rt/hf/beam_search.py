"""Beam search like `_beam_search` in Transformers 4.57, one prompt at a time.

The best continuations of all beams are kept. One that ends is a result if it is among the
num_beams best of its step; its score is its log-probability / length ** length_penalty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codellama_rt.engine.branches import Branch, Branches
from codellama_rt.engine.stop_strings import TextStream
from codellama_rt.hf.processors import process
from codellama_rt.hf.search import Found, Search


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
        self._padded = search.padded[index]
        self._room = search.max_model_len - len(self._prompt)
        n_beams = search.config.num_beams
        # At first all beams are the same; only the first is continued.
        self._beams = [_Beam((), 0.0 if i == 0 else -1e9, ()) for i in range(n_beams)]
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
        processed = process(self._search.processors, input_ids, log_probs)
        self._scores = processed + np.array([[beam.log_prob] for beam in self._beams])
        return logits, processed

    def select(self, is_last: bool) -> None:
        """Choose the beams of the next step, and the results of this one."""
        n_beams = self._search.config.num_beams
        candidates = self._candidates(n_beams * max(2, 1 + len(self._ends)))
        ending = self._ending(candidates, is_last)
        going = [beam for beam, ends in zip(candidates, ending, strict=True) if not ends][:n_beams]
        ended = [beam for beam, ends in zip(candidates[:n_beams], ending, strict=False) if ends]
        self.results += [_Result(self._score(beam), beam) for beam in ended]
        self.results.sort(key=lambda result: -result.score)
        del self.results[n_beams:]
        self.is_done = len(going) < n_beams or self._is_settled(going)
        if self.is_done:
            for branch in self._live:
                self._branches.drop(branch)
        else:
            self._follow(going)

    def _candidates(self, count: int) -> list[_Beam]:
        """Return the best continuations, best first; ties: the lower beam and token go first."""
        vocab_size = self._scores.shape[1]
        flat = self._scores.reshape(-1)
        count = min(count, flat.size)
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.lexsort((best, -flat[best]))]
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


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
