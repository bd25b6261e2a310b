"""What is served: /v1/models, /health, /version."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from codellama_rt import __version__
from codellama_rt.serve.answers import JSONAnswer
from codellama_rt.serve.errors import ApiError
from codellama_rt.serve.service import Service


async def model_list(request: Request) -> JSONAnswer:
    """List the model under each of its names, and the adapters."""
    service: Service = request.app.state.service
    listed = [_card(service, name) for name in (*service.names, *service.settings.adapters)]
    return JSONAnswer({"object": "list", "data": listed})


async def model_card(request: Request) -> JSONAnswer:
    """Describe one model."""
    service: Service = request.app.state.service
    name, _ = service.find(request.path_params["name"])
    return JSONAnswer(_card(service, name))


async def health(request: Request) -> JSONAnswer:
    """Say that the server runs, or 503 once its engine takes no requests."""
    service: Service = request.app.state.service
    try:
        service.engine.check_open()
    except RuntimeError as error:
        raise ApiError(503, str(error), code="unavailable") from None
    return JSONAnswer({"status": "ok"})


async def version(request: Request) -> JSONAnswer:
    """Say which version runs."""
    return JSONAnswer({"version": __version__})


def _card(service: Service, name: str) -> dict[str, Any]:
    is_adapter = name in service.settings.adapters
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "codellama_rt",
        "root": name if is_adapter else service.names[0],
        "parent": service.names[0] if is_adapter else None,
        "max_model_len": service.max_model_len,
        "permission": [],
    }
