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
from codellama_rt.serve import completions, models
from codellama_rt.serve.answers import answered, on_http_error
from codellama_rt.serve.guard import Guard
from codellama_rt.serve.service import Service
from codellama_rt.serve.settings import Settings

# method, paths, endpoint
ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    ("POST", ("/v1/completions", "/completions"), completions.completions),
    ("GET", ("/v1/models", "/models"), models.models),
    ("GET", ("/v1/models/{name:path}", "/models/{name:path}"), models.model),
    ("GET", ("/health", "/ping"), models.health),
    ("GET", ("/version",), models.version),
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
