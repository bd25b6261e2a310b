"""GET /: a page to try completion, infilling and chat, in one file and without another host."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse

# The page loads nothing, and its script speaks to this server alone.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(_source(), headers={"Content-Security-Policy": _POLICY})


@cache
def _source() -> str:
    return (files("codellama_rt.serve") / "page.html").read_text("utf-8")
