"""The routes, and the ASGI application of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from codellama_rt.engine.engine import Engine
from codellama_rt.llm.llm import LLM
from codellama_rt.serve.answers import answered, on_http_error
from codellama_rt.serve.chat import chat_completions
from codellama_rt.serve.completions import completions
from codellama_rt.serve.guard import Guard
from codellama_rt.serve.infilling import fim_completions, infill
from codellama_rt.serve.llama_cpp import completion, props
from codellama_rt.serve.metrics import metrics
from codellama_rt.serve.models import health, model_card, model_list, version
from codellama_rt.serve.openapi import openapi
from codellama_rt.serve.page import page
from codellama_rt.serve.service import Service
from codellama_rt.serve.settings import Settings
from codellama_rt.serve.tokens import detokenize, tokenize, tokenizer_info

# method, paths, endpoint
ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    ("POST", ("/v1/completions", "/completions"), completions),
    ("POST", ("/v1/chat/completions", "/chat/completions"), chat_completions),
    ("POST", ("/v1/fim/completions", "/fim/completions"), fim_completions),
    ("POST", ("/infill",), infill),
    ("POST", ("/completion",), completion),
    ("POST", ("/tokenize",), tokenize),
    ("POST", ("/detokenize",), detokenize),
    ("GET", ("/tokenizer_info",), tokenizer_info),
    ("GET", ("/props",), props),
    ("GET", ("/metrics",), metrics),
    ("GET", ("/openapi.json",), openapi),
    ("GET", ("/",), page),
    ("GET", ("/v1/models", "/models"), model_list),
    ("GET", ("/v1/models/{name:path}", "/models/{name:path}"), model_card),
    ("GET", ("/health", "/ping"), health),
    ("GET", ("/version",), version),
]


def create_app(model: LLM | Engine, settings: Settings | None = None) -> Guard:
    """Return an ASGI application that serves a model.

    The engine belongs to the application from its first request until its lifespan ends.

    Args:
        model: an LLM, or an engine, that nothing else uses meanwhile.
        settings: names, keys, limits; None: the model by its folder's name, for everyone.

    Example:
        >>> app = create_app(LLM("smollm2-135m-instruct"))  # doctest: +SKIP
        >>> uvicorn.run(app, http="h11")  # doctest: +SKIP
    """
    settings = Settings() if settings is None else settings
    service = Service(model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    app = Starlette(
        routes=[
            Route(path, answered(endpoint), methods=[method])
            for method, paths, endpoint in ROUTES
            for path in paths
        ],
        exception_handlers={HTTPException: on_http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    app.router.redirect_slashes = False
    return Guard(app, service)
