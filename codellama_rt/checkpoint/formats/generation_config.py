"""generation_config.json: how a checkpoint wants to be sampled, every value checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config_fields import ConfigFields

FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FLAGS = (
    *("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
)
_COUNTS = {  # the smallest of each
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "top_k": -1,
}
_NUMBERS = {  # the smallest and the largest
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "length_penalty": (-math.inf, math.inf),
}
_MOST = 2**31 - 1  # tokens, beams, ...
_MAX_ITEMS = 2**16  # of a list


def read_generation_config(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Read a directory's generation_config.json.

    Args:
        folder: the directory.
        vocab_size: of the model; ids that it does not have are left out, with a warning.

    Returns:
        The values, those of keys that nothing here uses included; empty without such a file.

    Raises:
        CheckpointError: a value of another type or out of range.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    values = read_object(file)
    fields = ConfigFields(values, str(file))
    for key in _IDS:
        ids = fields.token_ids(key, vocab_size=vocab_size)
        if values.get(key) in (None, []):
            continue  # [] says that there is none
        if not ids:
            del values[key]
        elif isinstance(values[key], list):
            values[key] = list(ids)
    for key in _FLAGS:
        fields.flag(key, False)
    for key, low in _COUNTS.items():
        fields.integer(key, None, low=low, high=_MOST)
    for key, (low, high) in _NUMBERS.items():
        _check_number(fields, key, low, high)
    if values.get("early_stopping") not in (None, True, False, "never"):
        raise fields.fault("early_stopping", "true, false or 'never'")
    _check_items(fields, "suppress_tokens", "token ids", _is_id)
    _check_items(fields, "bad_words_ids", "lists of token ids", _is_run)
    if not isinstance(values.get("stop_strings"), str):
        _check_items(fields, "stop_strings", "strings", lambda item: isinstance(item, str))
    return values


def _check_number(fields: ConfigFields, key: str, low: float, high: float) -> None:
    value = fields.values.get(key)
    if value is None:
        return
    is_number = type(value) in (int, float) and math.isfinite(_as_float(value))
    if not is_number or not low <= value <= high:
        bounds = (
            "" if low == -math.inf else f" from {low:g}" + f" to {high:g}" * math.isfinite(high)
        )
        raise fields.fault(key, f"a finite number{bounds}")


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_items(
    fields: ConfigFields, key: str, what: str, is_right: Callable[[Any], bool]
) -> None:
    value = fields.values.get(key)
    if value is None:
        return
    if not isinstance(value, list) or len(value) > _MAX_ITEMS or not all(map(is_right, value)):
        raise fields.fault(key, f"a list of {what}")


def _is_id(item: Any) -> bool:
    return type(item) is int and 0 <= item <= _MOST


def _is_run(item: Any) -> bool:
    return isinstance(item, list) and 0 < len(item) <= _MAX_ITEMS and all(map(_is_id, item))


def rejected(folder: Path, error: Exception) -> CheckpointError:
    """Return the error for values that contradict one another, naming the file."""
    return CheckpointError(f"{folder / FILE}: {error}")
