"""Errors as clients of OpenAI's API read them."""

from __future__ import annotations

import logging
import math
import re

from codellama_rt.errors import CheckpointChangedError, QueueFullError

logger = logging.getLogger("codellama_rt.serve")
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
# "SamplingParams: top_p must be ...", "allowed_token_ids[3] must be ...", "messages[0]: role must"
_NAMED = re.compile(r"^(?:(?:SamplingParams|StructuredOutputs): )?([a-z_]+)(?:\[[^\]]*\])*:? ")
_UNKNOWN_RETRY_S = 5
_MOST_RETRY_S = 3600


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong.
        code: for programs.
        headers: of the answer.
        extra: further entries of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **extra: object,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code if code is not None else status,
                **extra,
            }
        }


class ClientLeftError(Exception):
    """The client has closed its connection: there is nobody to answer."""


def invalid(message: str, param: str | None = None, **extra: object) -> ApiError:
    """Return the error of a request that cannot be served as it is."""
    return ApiError(400, message, param=param, **extra)


def unavailable(message: str, retry_after_s: float | None) -> ApiError:
    """Return the error of a server that could serve this request later.

    Args:
        message: for people.
        retry_after_s: seconds until then, as far as known.
    """
    seconds = _UNKNOWN_RETRY_S if retry_after_s is None else math.ceil(retry_after_s)
    seconds = min(max(1, seconds), _MOST_RETRY_S)
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def api_error(error: BaseException, known: frozenset[str] = frozenset()) -> ApiError:
    """Return what a client is told of an exception.

    Args:
        error: of a request, anywhere on its way.
        known: names of the request's fields, of which the message may begin with one.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return unavailable(str(error), error.retry_after_s)
    if isinstance(error, ImportError):  # before anything: an extra that is not installed
        return ApiError(501, str(error))
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointChangedError):
        named = _NAMED.match(str(error))
        param = named[1] if named and named[1] in known else None
        return invalid(str(error).removeprefix("SamplingParams: "), param)
    if isinstance(error, RuntimeError) and "AsyncEngine is" in str(error):
        return unavailable("the server is shutting down", None)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="server_error")
