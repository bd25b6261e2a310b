"""What can be wrong with a prompt and its parameters for a model."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from numbers import Integral

import numpy as np

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.sequence import int32_list


def checked_prompt(prompt_token_ids: object, vocab_size: int) -> array:
    """Return the prompt as an int32 list.

    Args:
        prompt_token_ids: a list or a 1-D integer array.
        vocab_size: of the model.

    Raises:
        TypeError: not integers.
        ValueError: empty, or a token outside the vocabulary.
    """
    if isinstance(prompt_token_ids, np.ndarray):
        prompt_token_ids = prompt_token_ids.tolist()
    if not isinstance(prompt_token_ids, (list, tuple, array)):
        kind = type(prompt_token_ids).__name__
        raise TypeError(f"prompt_token_ids must be a list of int, got {kind}; encode text first")
    if not prompt_token_ids:
        raise ValueError("prompt_token_ids must hold at least one token, got none; begin with BOS")
    if set(map(type, prompt_token_ids)) != {int}:
        for position, token_id in enumerate(prompt_token_ids):
            if not isinstance(token_id, Integral) or isinstance(token_id, bool):
                kind = type(token_id).__name__
                raise TypeError(f"prompt_token_ids[{position}] must be an int, got {kind}")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab_size:
        for position, token_id in enumerate(prompt_token_ids):
            check_token_id(token_id, vocab_size, f"prompt_token_ids[{position}]")
    return int32_list(map(int, prompt_token_ids))


def check_params(params: SamplingParams, vocab_size: int, has_tokenizer: bool) -> None:
    """Check what SamplingParams alone cannot check.

    Raises:
        TypeError: not SamplingParams.
        ValueError: a token outside the vocabulary, or what needs a tokenizer without one.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    ids: Collection[int] = params.stop_token_ids
    for i, token_id in enumerate(ids):
        check_token_id(token_id, vocab_size, f"stop_token_ids[{i}]")
    for i, token_id in enumerate(params.allowed_token_ids or ()):
        check_token_id(token_id, vocab_size, f"allowed_token_ids[{i}]")
    for token_id in params.logit_bias or ():
        check_token_id(token_id, vocab_size, f"logit_bias[{token_id}]")
    if params.stop and not has_tokenizer:
        raise ValueError("stop strings need a tokenizer; give the engine one or use stop_token_ids")
    if params.bad_words and not has_tokenizer:
        raise ValueError("bad_words need a tokenizer; give the engine one or use logit_bias")
    if params.structured_outputs is not None and not has_tokenizer:
        raise ValueError("structured_outputs need a tokenizer; give the engine one")


def check_token_id(token_id: int, vocab_size: int, name: str) -> None:
    """Raise ValueError if a token is outside the vocabulary."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"{name} must be a token id in [0, {vocab_size}), got {token_id}")
