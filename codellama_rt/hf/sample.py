"""Greedy search and sampling: each row continues independently until something ends it."""

from __future__ import annotations

import numpy as np

from codellama_rt.engine.branches import Branch, Branches
from codellama_rt.engine.stop_strings import TextStream
from codellama_rt.hf.search import Found, Search, nothing_allowed, padded_rows
from codellama_rt.hf.warping import warped
from codellama_rt.ops.reference_sampling import draw, uniform


class _Row:
    """One result in progress."""

    def __init__(self, search: Search, prompt: int, sample: int) -> None:
        self.prompt, self.sample = prompt, sample
        self.token_ids: list[int] = []
        self.ended = False
        self.branch: Branch | None = None
        self._ends = search.ends[prompt]
        self._room = search.max_model_len - len(search.prompts[prompt])
        self._text: TextStream | None = search.text_watch(search.prompts[prompt])

    def append(self, token_id: int) -> None:
        """Add a token and check whether it ends the row."""
        self.token_ids.append(token_id)
        stop = None if self._text is None else self._text.push(token_id)[1]
        self.ended = token_id in self._ends or stop is not None or len(self.token_ids) >= self._room


def sample(search: Search, branches: Branches) -> Found:
    """Run a search whose configuration has one beam.

    Returns:
        num_return_sequences results per prompt, grouped by prompt.
    """
    rows = _start(search, branches)
    found = Found([row.token_ids for row in rows], [row.prompt for row in rows])
    if search.streamer is not None:
        search.streamer.put(search.padded)
    prompts = search.padded[found.parents]
    for _ in range(search.max_new_tokens):
        logits = _logits(rows, branches)
        input_ids = np.hstack([prompts, padded_rows(found.rows, search.pad_id)])
        scores = search.processed(found.parents, input_ids, logits)
        tokens = [
            search.pad_id if row.ended else _choose(search, row, scores[i])
            for i, row in enumerate(rows)
        ]
        found.record(search.config, logits, scores)
        for row, token_id in zip(rows, tokens, strict=True):
            if not row.ended:
                row.append(token_id)
        if search.streamer is not None:
            search.streamer.put(np.array(tokens))
        input_ids = np.hstack([input_ids, np.array(tokens)[:, None]])
        _end(rows, search.stopped(input_ids, tuple(found.scores) or None), branches)
        if all(row.ended for row in rows):
            break
    return found


def _start(search: Search, branches: Branches) -> list[_Row]:
    """Return the rows; each prompt is computed once, however many results it has."""
    rows = []
    firsts = [branches.add(prompt, search.adapter) for prompt in search.prompts]
    branches.logits(firsts)
    for prompt, first in enumerate(firsts):
        for i in range(search.config.num_return_sequences):
            row = _Row(search, prompt, i)
            row.branch = branches.fork(first) if i else first
            rows.append(row)
    return rows


def _logits(rows: list[_Row], branches: Branches) -> np.ndarray:
    """Return (rows, vocab_size) float32; zeros for rows that have ended."""
    going = [i for i, row in enumerate(rows) if not row.ended]
    for i in going:
        if rows[i].token_ids:
            branches.append(rows[i].branch, rows[i].token_ids[-1])
    computed = branches.logits([rows[i].branch for i in going])
    logits = np.zeros((len(rows), computed.shape[1]), np.float32)
    logits[going] = computed
    return logits


def _choose(search: Search, row: _Row, scores: np.ndarray) -> int:
    """Choose the next token; when sampling, `scores` becomes the scores it is drawn from."""
    best = int(scores.argmax())
    if not np.isfinite(scores[best]):
        raise nothing_allowed(scores[best])
    if not search.config.do_sample or search.config.temperature == 0.0:
        return best
    token_ids, probs = warped(scores, search.config)
    if search.config.output_scores:
        kept = scores[token_ids] / search.config.temperature
        scores[:] = -np.inf
        scores[token_ids] = kept
    position = len(search.prompts[row.prompt]) + len(row.token_ids)
    return draw(token_ids, probs, uniform(search.seed + row.prompt, row.sample, position))


def _end(rows: list[_Row], stopped: np.ndarray, branches: Branches) -> None:
    """End the rows that the caller's criteria end, and free the blocks of all ended rows."""
    for row, is_stopped in zip(rows, stopped, strict=True):
        row.ended |= bool(is_stopped)
        if row.ended and row.branch is not None:
            branches.drop(row.branch)
            row.branch = None
