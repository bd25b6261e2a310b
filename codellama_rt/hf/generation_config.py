"""The fields of Transformers' GenerationConfig that this runtime supports."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.generation_config import FILE, rejected
from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import CheckpointError

_DEFAULT_NEW_TOKENS = 128  # if neither the call nor the checkpoint sets a limit
_COUNTS = {  # field: its minimum
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
}
_TUPLES = (
    *("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    "stop_strings",
)
_NUMBERS = ("length_penalty", "max_time")
_MASSES = ("typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(kw_only=True)
class GenerationConfig:
    """How to generate, with Transformers' names, meanings and defaults.

    Fields can be set later, too; `generate` checks them again.

    Args:
        max_new_tokens, max_length: limit without or with the prompt; 128 new tokens by default.
        min_new_tokens, min_length: end tokens are masked until then, without or with the prompt; of
            both, the one that asks for more tokens counts.
        max_time: seconds after which all rows end; the result then depends on the machine.
        do_sample: draw tokens instead of taking the likeliest.
        temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: shape the draw.
        repetition_penalty: values over 1 make tokens of prompt and output less likely.
        no_repeat_ngram_size: no run of so many tokens occurs twice; 0: no restriction.
        bad_words_ids: forbidden runs of tokens.
        suppress_tokens: forbidden tokens.
        begin_suppress_tokens: tokens that a continuation must not begin with.
        sequence_bias: run of tokens -> what is added to the score of its last one after the others;
            a mapping with tuples as keys, or a list of (run, bias).
        forced_bos_token_id: follows a prompt of one token.
        forced_eos_token_id: one or several; the last token if nothing else ends a row.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens the scores of
            the end tokens grow by |score| * (factor ** (tokens since) - 1).
        remove_invalid_values: a processor's NaN becomes 0, its infinities the largest number.
        renormalize_logits: scores become log-probabilities again after all processors.
        num_beams: values over 1 search with so many beams; with do_sample the continuations of
            a step are drawn without replacement.
        length_penalty: exponent of the length that a beam's score is divided by.
        early_stopping: end a beam search when num_beams are finished: True, False (when no better
            one is likely) or "never" (when none is possible).
        num_return_sequences: results per prompt.
        eos_token_id: ids that end a row, one or several; None: the checkpoint's.
        pad_token_id: fills rows that ended early; None: an end token.
        stop_strings: texts that end a row, and are kept in it.
        return_dict_in_generate, output_scores, output_logits: what to return.
        use_cache: accepted but ignored: keys and values are always cached.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range.

    Example:
        >>> GenerationConfig(num_beams=4, max_new_tokens=16).replaced(num_beams=2).num_beams
        2
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    max_time: float | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    use_cache: bool = True

    def __post_init__(self) -> None:
        """Validate, and turn lists into tuples."""
        for name in _TUPLES:
            setattr(self, name, _tuple_of(name, getattr(self, name)))
        self.bad_words_ids = _token_runs("bad_words_ids", self.bad_words_ids)
        self.sequence_bias = _biased_runs(self.sequence_bias)
        self.exponential_decay_length_penalty = _decay(self.exponential_decay_length_penalty)
        for name in _NUMBERS:
            _check_number(name, getattr(self, name))
        for name, least in _COUNTS.items():
            _check_count(name, getattr(self, name), least)
        for name in _MASSES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be bool or 'never', got {self.early_stopping!r}")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                "greedy search has one result: num_return_sequences > 1 needs do_sample=True or "
                "as many num_beams"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"{self.num_beams} beams cannot give num_return_sequences="
                f"{self.num_return_sequences}"
            )
        self.sampling()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read generation_config.json from a directory.

        Raises:
            CheckpointError: it is missing or damaged, or a value cannot be.
        """
        try:
            return cls.from_dict(read_object(Path(path) / FILE))
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise rejected(Path(path), error) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Read a checkpoint's configuration; fields of other kinds of models are ignored."""
        known = {field.name for field in fields(cls)}
        given = {name: x for name, x in values.items() if name in known and x is not None}
        return cls(**given)

    def replaced(self, **given: Any) -> GenerationConfig:
        """Return a copy with other values; None leaves a field unchanged, but eos_token_id=None.

        That means no end tokens, as in Transformers.

        Raises:
            TypeError: an unknown field.
        """
        unknown = sorted(given.keys() - {field.name for field in fields(self)})
        if unknown:
            raise TypeError(f"generate() has no argument {', '.join(unknown)}")
        if given.get("eos_token_id", ()) is None:
            given["eos_token_id"] = ()
        given = {name: value for name, value in given.items() if value is not None}
        if "max_new_tokens" in given:
            given.setdefault("max_length", None)  # overrides the checkpoint's own limit, if any
        return replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write generation_config.json into a directory."""
        text = json.dumps(self.to_dict(), indent=2)
        (Path(path) / FILE).write_text(text + "\n", "utf-8")

    def sampling(self) -> SamplingParams:
        """Return the part that the runtime's own sampler supports."""
        return SamplingParams(
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def new_tokens(self, prompt_len: int) -> int:
        """Return how many tokens may follow a prompt.

        Raises:
            ValueError: the prompt already fills max_length.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS
        if self.max_length <= prompt_len:
            raise ValueError(
                f"a prompt of {prompt_len} tokens leaves none of max_length={self.max_length}; "
                "raise it, or give max_new_tokens"
            )
        return self.max_length - prompt_len


def _tuple_of(name: str, value: Any) -> tuple | None:
    """Return one id or text, or several, as a tuple."""
    if value is None:
        return None if name == "eos_token_id" else ()
    kind = str if name == "stop_strings" else Integral
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for item in values:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"{name} must be one or several {kind.__name__}, got {item!r:.60}")
    return values


def _token_runs(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    runs = tuple(_tuple_of(name, run) for run in value or ())
    if not all(runs):
        raise ValueError(f"{name} must not contain an empty list")
    return runs


def _biased_runs(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = list(value.items() if isinstance(value, Mapping) else value or ())
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise TypeError("sequence_bias must map runs of tokens to numbers")
    for _, bias in pairs:
        _check_number("sequence_bias", bias)
    runs = _token_runs("sequence_bias", [run for run, _ in pairs])
    return tuple(zip(runs, (float(bias) for _, bias in pairs), strict=True))


def _decay(value: Any) -> tuple[int, float] | None:
    if value is None:
        return None
    name = "exponential_decay_length_penalty"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{name} must be (start, factor), got {value!r:.60}")
    _check_count(f"{name}[0]", value[0], 0)
    _check_number(f"{name}[1]", value[1])
    return int(value[0]), float(value[1])


def _check_number(name: str, value: Any) -> None:
    if value is None and name == "max_time":
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
