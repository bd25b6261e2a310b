"""What becomes of a request's fields: one table of names, and the few that are not copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from codellama_rt.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from codellama_rt.engine.structured_outputs import StructuredOutputs
from codellama_rt.serve.errors import invalid
from codellama_rt.serve.protocol import (
    LlamaCppSampling,
    ResponseFormat,
    Sampling,
    StructuredOutput,
)

# The field of a request -> that of SamplingParams, which checks its value.
OPENAI = {
    name: name
    for name in (
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "bad_words"),
        *("stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
        *("allowed_token_ids", "prompt_logprobs"),
    )
}
LLAMA_CPP = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "ignore_eos": "ignore_eos",
}
MAX_CACHE_SALT = 128


def openai_params(request: Sampling, defaults: SamplingParams, **given: Any) -> SamplingParams:
    """Return the parameters of a request in OpenAI's form.

    Args:
        request: whose fields count unless they are null.
        defaults: for those that are.
        given: values that the endpoint has made of others; None: nothing.

    Raises:
        ValueError, TypeError: of `SamplingParams`; the message begins with the field's name.
        ApiError: 400.
    """
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request, name, None) == -1:
            raise invalid(
                f"{name} must be 0 to {MAX_LOGPROBS}, got -1: the log-probabilities of all tokens "
                "are not reported",
                name,
            )
    values = {theirs: getattr(request, ours) for ours, theirs in OPENAI.items()}
    values["seed"] = seed(request.seed)
    values["logit_bias"] = token_biases(request.logit_bias)
    values["structured_outputs"] = structured_outputs(request)
    values |= given
    if values["max_tokens"] is None and request.n_predict is not None:
        values["max_tokens"] = request.n_predict if request.n_predict >= 0 else None
        defaults = replace(defaults, max_tokens=values["max_tokens"])
    return _replaced(defaults, values)


def llama_cpp_params(
    request: LlamaCppSampling, defaults: SamplingParams, **given: Any
) -> SamplingParams:
    """Return the parameters of a request in llama.cpp's form; as `openai_params`."""
    values = {theirs: getattr(request, ours) for ours, theirs in LLAMA_CPP.items()}
    values["seed"] = seed(request.seed)
    values["logit_bias"] = _llama_cpp_biases(request.logit_bias)
    if request.json_schema is not None:
        values["structured_outputs"] = StructuredOutputs(json=request.json_schema)
    elif request.grammar:
        values["structured_outputs"] = StructuredOutputs(grammar=request.grammar)
    if request.n_predict is not None:  # -1 and -2: without a limit
        values["max_tokens"] = request.n_predict if request.n_predict >= 0 else None
        defaults = replace(defaults, max_tokens=values["max_tokens"])
    values |= given
    return _replaced(defaults, values)


def _replaced(defaults: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("top_k", 0) > 2**31 - 1:
        raise invalid("top_k must be a number of tokens, got more than a vocabulary has", "top_k")
    return replace(defaults, **given)


def seed(value: int | None) -> int | None:
    """Return a seed of the engine: any int64 is one; -1 stands for a fresh one."""
    if value is None or value == -1:
        return None
    if not -(2**63) <= value < 2**64:
        raise invalid("seed must be an integer of 64 bits", "seed")
    return value % 2**64


def cache_salt(salt: str | None) -> str | None:
    """Return a salt, checked: vLLM's rules.

    Raises:
        ApiError: 400.
    """
    if salt is None:
        return None
    if not 0 < len(salt) <= MAX_CACHE_SALT or any(one in salt for one in "@/\\\0"):
        raise invalid(
            f"cache_salt must have 1 to {MAX_CACHE_SALT} characters, none of @, /, \\ and NUL",
            "cache_salt",
        )
    return salt


def token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    """Return OpenAI's biases with the token ids that its JSON has as strings."""
    if biases is None:
        return None
    for name in biases:
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise invalid(f"logit_bias: expected token ids as keys, got {name!r:.40}", "logit_bias")
    return {int(name): bias for name, bias in biases.items()}


def _llama_cpp_biases(biases: list[Any] | dict[str, float] | None) -> dict[int, float] | None:
    """Return llama.cpp's pairs [token id, bias]; false bans a token."""
    if biases is None or isinstance(biases, dict):
        return token_biases(biases)
    found = {}
    for pair in biases:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            raise invalid("logit_bias: expected pairs [token id, bias]", "logit_bias")
        found[pair[0]] = -100.0 if pair[1] is False else pair[1]
    return found


def structured_outputs(request: Sampling) -> StructuredOutputs | None:
    """Return the form that a request asks for, by either of its two fields.

    Raises:
        ApiError: 400: both are given, a schema is missing, or a kind is not supported.
    """
    wanted, form = request.structured_outputs, request.response_format
    by_format = None if form is None else _of_format(form)
    if wanted is None:
        return by_format
    if by_format is not None:
        raise invalid("give response_format or structured_outputs, not both", "structured_outputs")
    if wanted.structural_tag is not None:
        raise invalid(
            "structured_outputs: structural_tag is not supported; give json, regex, choice, "
            "grammar or json_object",
            "structured_outputs",
        )
    return _checked(wanted)


def _checked(wanted: StructuredOutput) -> StructuredOutputs:
    try:
        return StructuredOutputs(
            json=wanted.json,
            regex=wanted.regex,
            choice=wanted.choice,
            grammar=wanted.grammar,
            json_object=wanted.json_object,
        )
    except (ValueError, TypeError) as error:
        raise invalid(str(error), "structured_outputs") from None


def _of_format(form: ResponseFormat) -> StructuredOutputs | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputs(json_object=True)
    if form.json_schema is None:
        raise invalid("response_format: json_schema is missing", "response_format")
    try:
        return StructuredOutputs(json=form.json_schema.schema)
    except (ValueError, TypeError) as error:
        raise invalid(str(error), "response_format") from None
