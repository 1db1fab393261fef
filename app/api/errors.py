"""Errors as HTTP: the one home of their statuses, in OpenAI's envelope."""

from __future__ import annotations

import math

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app import errors as e
from app.api.front import facts_of

_CODES: dict[int, tuple[e.Code, ...]] = {
    400: ("invalid_request", "invalid_value", "unknown_parameter", "unsupported_parameter", "invalid_json"),
    401: ("invalid_api_key",),
    403: ("not_allowed",),
    404: ("model_not_found",),
    406: ("not_acceptable",),
    408: ("request_timeout",),
    413: ("body_too_large",),
    415: ("unsupported_encoding",),
    429: ("rate_limit_exceeded",),
    431: ("headers_too_large",),
    499: ("cancelled",),
    500: ("internal_error", "crashed", "non_finite_output"),
    503: (
        *("unavailable", "overloaded", "no_worker", "shutting_down"),
        *("model_load_failed", "model_not_downloaded", "lora_load_failed"),
    ),
    504: ("deadline_exceeded",),
    507: ("insufficient_gpu_memory",),
}
STATUS = {code: status for status, codes in _CODES.items() for code in codes}

KINDS = {403: "permission_error", 429: "rate_limit_error"}
"""The `type` in the envelope; other statuses have invalid_request_error, or server_error from 500 on."""

WORDS: dict[e.Code, str] = {
    "internal_error": "The server failed on this request.",
    "non_finite_output": "This image came out as numbers that are not finite.",
    "model_load_failed": "This model cannot be loaded.",
    "lora_load_failed": "This LoRA cannot be loaded.",
}
"""Messages in place of an error's own, which may name files: only the log and /v1/models show those."""

HEADERS: dict[e.Code, dict[str, str]] = {
    "unsupported_encoding": {"Accept-Encoding": "identity"},
    "invalid_api_key": {"WWW-Authenticate": "Bearer"},
}

AGAIN = frozenset({"rate_limit_exceeded", "unavailable", "overloaded", "no_worker", "shutting_down"})
"""Codes after which OpenAI's client shall try again. By itself it does after every 5xx."""

RETRY_AFTER = (1, 120)  # least and most seconds: above 120 OpenAI's client gives up at once


class ErrorDetail(BaseModel):
    """What went wrong: `param` is the field, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """OpenAI's error envelope; every error of this server has this shape."""

    error: ErrorDetail


def envelope(error: e.InstepError) -> ErrorReply:
    """The body of the answer to this error."""
    return _envelope(STATUS[error.code], WORDS.get(error.code, error.message), error.param, error.code)


def error_response(error: e.InstepError) -> Response:
    """The whole answer: status, envelope and headers, with Retry-After where a later try may succeed."""
    status, headers = STATUS[error.code], dict(HEADERS.get(error.code, {}))
    if isinstance(error, e.Unavailable | e.RateLimited):
        low, high = RETRY_AFTER
        headers["Retry-After"] = str(min(high, max(low, math.ceil(error.retry_after or low))))
    if error.code in AGAIN or status >= 500:
        headers["X-Should-Retry"] = "true" if error.code in AGAIN else "false"
    return JSONResponse(envelope(error).model_dump(), status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of errors that a route raised: a request that no job failed for counts as rejected."""
    assert isinstance(error, e.InstepError)
    facts = facts_of(request)
    if "error" not in facts:
        facts["error"] = error.code
        request.app.state.front.metrics.rejected(facts.get("model", ""), error.code)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of its own refusals (no such route, wrong method), answered in the same envelope."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = _envelope(error.status_code, str(error.detail), None, code)
    response = JSONResponse(body.model_dump(), error.status_code, error.headers)
    if "GET" in response.headers.get("allow", "").split(", "):
        response.headers["allow"] += ", HEAD"
    return response


async def on_invalid(request: Request, error: Exception) -> Response:
    """FastAPI's handler of a path or query parameter that it refused."""
    assert isinstance(error, RequestValidationError)
    place, reason = e.first_problem(error.errors())
    return error_response(e.InvalidValue(f"{place[-1]}: {reason}", param=place[-1]))


def _envelope(status: int, message: str, param: str | None, code: str) -> ErrorReply:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorReply(error=ErrorDetail(message=e.plain(message), type=kind, param=param and e.plain(param), code=code))
