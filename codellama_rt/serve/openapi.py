"""GET /openapi.json: the endpoints, made of the types that read and write them."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request

from codellama_rt import __version__
from codellama_rt.serve.answers import JSONAnswer
from codellama_rt.serve.chat_form import ChatAnswer
from codellama_rt.serve.completion_form import CompletionAnswer
from codellama_rt.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FimRequest,
    InfillRequest,
    LlamaCppCompletionRequest,
    TokenizeRequest,
)

# path -> (type of the body, type of the answer, what it does)
_POSTS: dict[str, tuple[Any, Any, str]] = {
    "/v1/completions": (
        CompletionRequest,
        CompletionAnswer,
        "Continue texts, or fill gaps",
    ),
    "/v1/chat/completions": (ChatRequest, ChatAnswer, "Answer a conversation"),
    "/v1/fim/completions": (FimRequest, ChatAnswer, "Fill a gap"),
    "/infill": (InfillRequest, dict[str, Any], "Fill a gap, as llama.cpp's server"),
    "/completion": (
        LlamaCppCompletionRequest,
        dict[str, Any],
        "Continue a text, as llama.cpp's server",
    ),
    "/tokenize": (TokenizeRequest, dict[str, Any], "Encode a text or a conversation"),
    "/detokenize": (DetokenizeRequest, dict[str, Any], "Decode token ids"),
}
_GETS = {
    "/v1/models": "List the models",
    "/health": "Say that the server runs",
    "/version": "Say which version runs",
    "/props": "Describe the server, as llama.cpp's",
    "/tokenizer_info": "Describe the tokenizer",
}
_STATUSES = {
    "400": "A field's value cannot be; `param` names it",
    "401": "No valid key",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "501": "Not supported by this server",
    "503": "The queue is full; Retry-After says for how long",
}


class Error(msgspec.Struct):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorAnswer(msgspec.Struct):
    """The body of every answer but 200."""

    error: Error


async def openapi(request: Request) -> JSONAnswer:
    """Return the description."""
    return JSONAnswer(description())


@cache
def description() -> dict[str, Any]:
    """Return the API in OpenAPI 3.1."""
    types = [*(kind for post in _POSTS.values() for kind in post[:2]), ErrorAnswer]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    *pairs, error = schemas
    paths: dict[str, Any] = {}
    for i, (path, (*_, summary)) in enumerate(_POSTS.items()):
        body, answer = pairs[2 * i], pairs[2 * i + 1]
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        if "completion" in path or path == "/infill":
            content["text/event-stream"] = {}  # OpenAPI 3.1 has no schema for events
        paths[path] = {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body}},
                },
                "responses": _responses(content, error),
            }
        }
    for path, summary in _GETS.items():
        paths[path] = {
            "get": {
                "operationId": path.strip("/").replace("/", "_"),
                "summary": summary,
                "responses": _responses({"application/json": {"schema": {}}}, error),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "codellama_rt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _responses(content: dict[str, Any], error: Any) -> dict[str, Any]:
    failed = {"application/json": {"schema": error}}
    return {"200": {"description": "The answer", "content": content}} | {
        status: {"description": text, "content": failed} for status, text in _STATUSES.items()
    }
