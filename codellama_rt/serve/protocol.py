"""What clients send: a type per endpoint. A field that may be left out may also be null.

Unknown fields are ignored, as OpenAI and vLLM do. `fields.py` says what becomes of each field.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Strings = str | list[str]


class StreamOptions(Struct, kw_only=True):
    """What a stream brings besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct, kw_only=True):
    """A schema by name."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutput(Struct, kw_only=True):
    """vLLM's way to ask for a form of the output; exactly one is given."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class Sampling(Struct, kw_only=True):
    """The fields that OpenAI's endpoints share, with vLLM's."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: Strings | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutput | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_progress: bool | None = None  # llama.cpp's, as its editors send it to every endpoint
    n_predict: int | None = None  # the same: its name of max_tokens; -1: without a limit


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    suffix: str | None = None
    suffix_first: bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None


class FimRequest(Sampling, kw_only=True):
    """POST /v1/fim/completions, Mistral's endpoint for infilling."""

    prompt: str
    suffix: str | None = None
    suffix_first: bool | None = None


class FunctionDescription(Struct, kw_only=True):
    """A function that an answer may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct, kw_only=True):
    """A tool of a chat request."""

    function: FunctionDescription
    type: Literal["function"] = "function"


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None


class LlamaCppSampling(Struct, kw_only=True):
    """The fields that llama.cpp's endpoints share."""

    model: str | None = None
    n_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Strings | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: list[Any] | dict[str, float] | None = None
    n_probs: int | None = None
    n_indent: int | None = None
    t_max_predict_ms: float | None = None
    t_max_prompt_ms: float | None = None
    samplers: Any = None
    response_fields: list[str] | None = None
    return_progress: bool | None = None
    return_tokens: bool | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    cache_prompt: bool | None = None
    id_slot: int | None = None


class LlamaCppCompletionRequest(LlamaCppSampling, kw_only=True):
    """POST /completion."""

    prompt: str | list[Any]


class ExtraText(Struct, kw_only=True):
    """A text of another file, as context of a filling."""

    text: str
    filename: str | None = None
    time: Any = None  # llama.vim sends what reltime() gives, a list


class InfillRequest(LlamaCppSampling, kw_only=True):
    """POST /infill."""

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: list[ExtraText] | None = None
    prompt: str | None = None
    suffix_first: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize: vLLM's fields (prompt or messages) or llama.cpp's (content)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None
