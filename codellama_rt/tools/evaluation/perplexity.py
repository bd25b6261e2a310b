"""Perplexity of files, with the whole file as context or a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.llm.llm import LLM
from codellama_rt.llm.scoring import logits_by_chunk
from codellama_rt.tools.evaluation.completing import Progress

_FIRST_EDGE = 256  # the curve has one point for positions below it, then one per doubling


def evaluate_perplexity(
    llm: LLM,
    paths: Sequence[Path],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every token of every file, given the tokens before it.

    Args:
        llm: the model.
        paths: UTF-8 texts.
        context: tokens of a window, including the begin token; None: the whole file.
        stride: tokens between windows; tokens scored before serve as context only. None: half of
            the context.
        progress: called with tokens computed and total tokens.

    Returns:
        `scores`: perplexity over all tokens and per file; `curve`: perplexity by the number of
        tokens before, as in the paper's figure 4.

    Raises:
        ValueError: an invalid window, an empty file, one that is not UTF-8, or one longer than
            the model's limit.
        OSError: a file cannot be read.
    """
    longest = llm.max_model_len if context is None else context
    if not 2 <= longest <= llm.max_model_len:
        raise ValueError(
            f"context must be from 2 to max_model_len={llm.max_model_len}, got {longest}"
        )
    if stride is None:
        stride = max(1, longest // 2)
    if not 1 <= stride < longest:
        raise ValueError(f"stride must be from 1 to context - 1 = {longest - 1}, got {stride}")
    texts = {path: _token_ids(llm, path) for path in paths}
    for path, ids in texts.items():
        if context is None and len(ids) > longest:
            raise ValueError(
                f"{path} has {len(ids)} tokens, more than max_model_len={longest}; raise that, or "
                "give a context for a sliding window"
            )
    windows = {path: list(_windows(len(ids), longest, stride)) for path, ids in texts.items()}
    total = sum(end - begin for its in windows.values() for begin, _, end in its)
    done, curve, files = 0, _Curve(), []
    for path, ids in texts.items():
        loss, count = 0.0, 0
        for begin, first, end in windows[path]:
            losses = _losses(llm, ids, begin, first, end)
            curve.add(first - begin, losses)
            loss, count, done = loss + float(losses.sum()), count + len(losses), done + end - begin
            if progress is not None:
                progress(done, total)
        files.append(
            {"path": str(path), "tokens": count, "loss": loss, "perplexity": math.exp(loss / count)}
        )
    tokens = sum(file["tokens"] for file in files)
    return {
        "task": "perplexity",
        "settings": {"context": context, "stride": stride if context else None, "tokens": tokens},
        "scores": {"perplexity": math.exp(sum(file["loss"] for file in files) / tokens)},
        "curve": curve.points(),
        "samples": files,
    }


def _token_ids(llm: LLM, path: Path) -> list[int]:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    tokenizer = llm.prompt_encoder.require_tokenizer()
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"{path} has no token to score")
    return ids


def _windows(count: int, longest: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first scored token, end) per window; together they score all but the first."""
    begin, first, end = 0, 1, min(longest, count)
    yield begin, first, end
    while end < count:
        first, end = end, min(end + stride, count)
        begin = end - longest
        yield begin, first, end


def _losses(llm: LLM, ids: Sequence[int], begin: int, first: int, end: int) -> np.ndarray:
    """Return the negative log-probabilities of tokens first to end, given those from begin."""
    losses = []
    window = list(ids[begin : end - 1])
    if llm.tokenizer.adds_bos:
        window[0] = llm.tokenizer.bos_id  # of later windows, too
    position = begin
    chunks = logits_by_chunk(
        llm.model,
        window,
        kv_dtype=llm.kv_cache.dtype,
        chunk_size=llm.engine.scheduler.max_num_batched_tokens,
        forward=llm.engine.forward,
    )
    for logits in chunks:
        following = np.array(ids[position + 1 : position + 1 + len(logits)])
        scored = np.arange(position + 1, position + 1 + len(logits)) >= first
        position += len(logits)
        rows = logits[scored].astype(np.float64)
        highest = rows.max(axis=1, initial=-np.inf)
        total = highest + np.log(np.exp(rows - highest[:, None]).sum(axis=1))
        losses.append(total - rows[np.arange(len(rows)), following[scored]])
    return np.concatenate(losses)


class _Curve:
    """Losses by the number of tokens before."""

    def __init__(self) -> None:
        self._loss: dict[int, float] = {}
        self._count: dict[int, int] = {}

    def add(self, first: int, losses: np.ndarray) -> None:
        before = np.arange(first, first + len(losses))
        doublings = np.ceil(np.log2(np.maximum(before + 1, _FIRST_EDGE) / _FIRST_EDGE))
        edges = _FIRST_EDGE * 2**doublings
        for edge in np.unique(edges).astype(int).tolist():
            inside = losses[edges == edge]
            self._loss[edge] = self._loss.get(edge, 0.0) + float(inside.sum())
            self._count[edge] = self._count.get(edge, 0) + len(inside)

    def points(self) -> list[dict[str, float]]:
        return [
            {
                "tokens_before": edge,
                "tokens": self._count[edge],
                "perplexity": math.exp(self._loss[edge] / self._count[edge]),
            }
            for edge in sorted(self._loss)
        ]
