"""The one-call interface."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.arguments import Prompt, as_prompts
from codellama_rt.llm.llm import LLM


def generate(
    model: str | os.PathLike[str] | LLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stream: bool = False,
    **llm_options,
) -> str | list[str] | Iterator[str]:
    """Complete prompts; a prompt with <FILL_ME> is filled in instead.

    Args:
        model: directory, GGUF file, built-in name, hub id, or an LLM (which stays open).
        prompts: a str, token ids, or a list of either.
        max_new_tokens: upper bound on the generated tokens.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this total probability.
        top_k: sample from this many likeliest tokens; 0: all.
        seed: makes sampling repeatable.
        stop: strings that end the output, not part of it.
        stream: yield the text as it comes; one prompt only.
        **llm_options: as `LLM` takes them, when `model` is not an LLM.

    Returns:
        The continuation (or filling) alone: str for one prompt, a list for a list, an iterator of
        pieces with stream=True.

    Raises:
        CheckpointError, ValueError, TypeError, RuntimeError: as `LLM` and `LLM.generate`.

    Example:
        >>> generate("smollm2-135m-instruct", "1, 2, 3,", max_new_tokens=3)  # doctest: +SKIP
        ' 4,'
    """
    params = SamplingParams(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
    )
    if isinstance(model, LLM) and llm_options:
        raise TypeError(f"an LLM is already made; it takes no {', '.join(sorted(llm_options))}")
    items, is_single = as_prompts(prompts)
    if stream and not is_single:
        raise ValueError(f"stream=True takes one prompt, got {len(items)}")
    llm = model if isinstance(model, LLM) else LLM(model, **llm_options)
    if stream:
        return _closing(llm, llm.stream(items[0], params), close=llm is not model)
    try:
        texts = [completion.text for completion in llm.generate(items, params)]
    finally:
        if llm is not model:
            llm.close()
    return texts[0] if is_single else texts


def _closing(llm: LLM, pieces: Iterator[str], *, close: bool) -> Iterator[str]:
    try:
        yield from pieces
    finally:
        if close:
            llm.close()
