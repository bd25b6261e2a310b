"""The sampling parameters, with vLLM's names, validated when they are created."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

from codellama_rt.engine.structured_outputs import StructuredOutputs

# (tokens of the output, logits as a NumPy array) -> logits; the command line imports this module,
# and not NumPy, before it knows its command.
LogitsProcessor = Callable[[Sequence[int], Any], Any]

MAX_SAMPLES = 64  # limits that keep one request from exhausting the machine's memory
MAX_STOPS = 16
MAX_BAD_WORDS = 256
MAX_LOGPROBS = 20


class _Range(NamedTuple):
    low: float
    high: float | None = None
    above_low: bool = False  # the lower bound itself is excluded

    def holds(self, value: float) -> bool:
        over = value > self.low if self.above_low else value >= self.low
        return over and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = f"{'>' if self.above_low else '>='} {self.low}"
        return low if self.high is None else f"{low} and <= {self.high}"


_INTEGERS = {
    "n": _Range(1, MAX_SAMPLES),
    "max_tokens": _Range(0),
    "min_tokens": _Range(0),
    "top_k": _Range(-1),
    "seed": _Range(0, 2**64 - 1),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS),
}
_REALS = {
    "temperature": _Range(0.0),
    "top_p": _Range(0.0, 1.0, above_low=True),
    "min_p": _Range(0.0, 1.0),
    "repetition_penalty": _Range(0.01, 100.0),  # a wider range could overflow all logits
    "presence_penalty": _Range(-2.0, 2.0),
    "frequency_penalty": _Range(-2.0, 2.0),
}
_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
_LOGIT_BIAS = _Range(-100.0, 100.0)  # OpenAI's range: the extremes ban or force a token
_TOKEN_ID = _Range(0, 2**31 - 1)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens from logits and when to stop; greedy by default.

    Args:
        n: samples of one prompt, 1 to 64.
        max_tokens: maximum number of new tokens; None: as many as the model's length allows; 0: the
            prompt is computed, for its `prompt_logprobs` or for the prefix cache.
        min_tokens: new tokens before end-of-sequence, a stop token or a stop string may end it.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the likeliest tokens whose predecessors sum to at most this probability.
        top_k: keep this many likeliest tokens; 0 or -1: all.
        min_p: drop tokens below this fraction of the likeliest one's probability.
        repetition_penalty: values over 1 make tokens of the prompt and the output less likely.
        presence_penalty: subtracted once from the logit of each token of the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id -> added to its logit, -100 to 100.
        allowed_token_ids: the only tokens that may be chosen; None: all.
        bad_words: strings (a str or up to 256) whose tokens never follow one another: the last one
            is forbidden after those before it.
        logits_processors: called one after another, before everything else, with (token_ids,
            logits): the output so far, a list of int, and (vocab_size,) float32, which they may
            change; each returns the logits. They may be called again for the same tokens, so the
            result must depend on nothing else. An exception ends this request alone.
        structured_outputs: a form that the output has, such as a JSON schema. The tokens that end
            the output are allowed where it is complete, and nowhere else.
        seed: fixes the draws; None: a fresh seed per request.
        stop: strings that end the text (a str or up to 16); not included in the text. The name of a
            control token stands for the token.
        stop_token_ids: token ids that end the output, besides end-of-sequence.
        ignore_eos: continue after end-of-sequence.
        include_stop_str_in_output: keep the stop string, or the text of the stop token, in the
            text.
        skip_special_tokens: leave control tokens out of the text; otherwise their names appear.
        logprobs: report the log-probability of each new token and of this many likeliest ones.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range, NaN or infinite.

    Example:
        >>> SamplingParams(max_tokens=32, temperature=0.2, top_p=0.95, stop="\\n\\n").stop
        ('\\n\\n',)
    """

    n: int = 1
    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Validate, and normalise numbers and lists."""
        for name, allowed in (_INTEGERS | _REALS).items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            number = _integer if name in _INTEGERS else _real
            self._set(name, number(name, value, allowed))
        self._set("stop", _strings("stop", self.stop, MAX_STOPS, "end"))
        self._set("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS, "forbid"))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("allowed_token_ids", _allowed_token_ids(self.allowed_token_ids))
        self._set("logit_bias", _logit_bias(self.logit_bias))
        name = "SamplingParams: logits_processors"
        self._set("logits_processors", checked_processors(self.logits_processors, name))
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise _wrong_type(
                "structured_outputs", "StructuredOutputs or None", self.structured_outputs
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong_type(name, "a bool", getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"SamplingParams: min_tokens must be <= max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}; raise max_tokens"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for callers; normalised once, here

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, without a draw."""
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether the probabilities depend on the tokens before."""
        neutral = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != neutral


def _wrong_type(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"SamplingParams: {name} must be {expected}, got {type(value).__name__}")


def _integer(name: str, value: object, allowed: _Range) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _wrong_type(name, "an int" + (" or None" if name in _OPTIONAL else ""), value)
    return int(_within(name, value, allowed))


def _real(name: str, value: object, allowed: _Range) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _wrong_type(name, "a number", value)
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    if value - value != 0.0:  # NaN or infinite
        raise ValueError(f"SamplingParams: {name} must be finite, got {value}")
    return _within(name, value, allowed)


def _within(name: str, value: float, allowed: _Range) -> float:
    if not allowed.holds(value):
        raise ValueError(f"SamplingParams: {name} must be {allowed}, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _strings(name: str, given: object, most: int, effect: str) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else given
    if not isinstance(strings, (tuple, list)):
        raise _wrong_type(name, "a str or a list of str", given)
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise _wrong_type(f"{name}[{i}]", "a str", string)
        if not string:
            raise ValueError(
                f"SamplingParams: {name}[{i}] must not be empty; it would {effect} every text"
            )
    if len(strings) > most:
        raise ValueError(f"SamplingParams: {name} takes at most {most}, got {len(strings)}")
    return tuple(strings)


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, (str, bytes, Mapping)) or not hasattr(ids, "__iter__"):
        raise _wrong_type(name, "a list of int", ids)
    return tuple(_integer(f"{name}[{i}]", x, _TOKEN_ID) for i, x in enumerate(ids))


def _allowed_token_ids(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    allowed = _token_ids("allowed_token_ids", ids)
    if not allowed:
        raise ValueError("SamplingParams: allowed_token_ids must hold a token; None allows all")
    return allowed


def checked_processors(
    given: object, name: str = "logits_processors"
) -> tuple[LogitsProcessor, ...]:
    """Return the processors of an argument `name` as a tuple; TypeError unless all are callable."""
    processors = () if given is None else given
    if not isinstance(processors, (tuple, list)):
        kind = type(given).__name__
        raise TypeError(f"{name} must be a list of callables, got {kind}")
    for i, processor in enumerate(processors):
        if not callable(processor):
            kind = type(processor).__name__
            raise TypeError(f"{name}[{i}] must be callable, got {kind}")
    return tuple(processors)


def _logit_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise _wrong_type("logit_bias", "a mapping of token id to number", bias)
    return {
        _integer("logit_bias key", token_id, _TOKEN_ID): _real(
            f"logit_bias[{_short(token_id)}]", value, _LOGIT_BIAS
        )
        for token_id, value in bias.items()
    }
