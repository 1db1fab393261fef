"""Errors as HTTP: the one table from error codes to statuses, in OpenAI's envelope."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app import errors as e
from app.api.front import facts_of


@dataclass(frozen=True)
class Answer:
    """How the errors of a code are answered. kind: the `type` in the envelope. headers: further ones.

    retry: the x-should-retry header of OpenAI's client, None for its own rule (it retries 408, 409, 429 and 5xx).
    text: shown instead of the error's own message.
    """

    status: int
    kind: str
    retry: bool | None = None
    text: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_BAD = "invalid_request_error"
_SERVER = "server_error"

TABLE: dict[e.Code, Answer] = {
    "internal_error": Answer(500, _SERVER, False, "The server failed on this request."),
    "invalid_request": Answer(400, _BAD),
    "invalid_value": Answer(400, _BAD),
    "unknown_parameter": Answer(400, _BAD),
    "unsupported_parameter": Answer(400, _BAD),
    "invalid_json": Answer(400, _BAD),
    "not_acceptable": Answer(406, _BAD),
    "unsupported_encoding": Answer(415, _BAD, headers={"Accept-Encoding": "identity"}),
    "body_too_large": Answer(413, _BAD),
    "headers_too_large": Answer(431, _BAD, False),
    "request_timeout": Answer(408, _BAD),
    "model_not_found": Answer(404, _BAD),
    "invalid_api_key": Answer(401, _BAD, False, headers={"WWW-Authenticate": "Bearer"}),
    "not_allowed": Answer(403, "permission_error", False),
    "rate_limit_exceeded": Answer(429, "rate_limit_error", True),
    "unavailable": Answer(503, _SERVER, True),
    "overloaded": Answer(503, _SERVER, True),
    "no_worker": Answer(503, _SERVER, True),
    "shutting_down": Answer(503, _SERVER, True),
    "deadline_exceeded": Answer(504, _SERVER, False),
    "cancelled": Answer(499, _BAD, False),
    "non_finite_output": Answer(500, _SERVER, False, "This image came out as numbers that are not finite."),
    "insufficient_gpu_memory": Answer(507, _SERVER, False),
    "model_load_failed": Answer(503, _SERVER, False, "This model cannot be loaded."),
    "model_not_downloaded": Answer(503, _SERVER, False),
}
"""Every code. Load errors name files, which only the log and /v1/models show."""

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
    answer = TABLE[error.code]
    return _envelope(answer.text or error.message, answer.kind, error.param, error.code)


def error_response(error: e.InstepError) -> Response:
    """The whole answer: status, envelope and headers, with Retry-After where a later try may succeed."""
    answer = TABLE[error.code]
    headers = dict(answer.headers)
    if isinstance(error, e.Unavailable | e.RateLimited):
        low, high = RETRY_AFTER
        headers["Retry-After"] = str(min(high, max(low, math.ceil(error.retry_after or low))))
    if answer.retry is not None:
        headers["x-should-retry"] = "true" if answer.retry else "false"
    return JSONResponse(envelope(error).model_dump(), answer.status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of errors that a route raised."""
    assert isinstance(error, e.InstepError)
    facts_of(request).setdefault("error", error.code)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of its own refusals (no such route, wrong method), answered in the same envelope."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = _envelope(str(error.detail), _BAD, None, code)
    response = JSONResponse(body.model_dump(), error.status_code, error.headers)
    if "GET" in response.headers.get("allow", "").split(", "):
        response.headers["allow"] += ", HEAD"
    return response


async def on_invalid(request: Request, error: Exception) -> Response:
    """FastAPI's handler of a path or query parameter that it refused."""
    assert isinstance(error, RequestValidationError)
    place, reason = e.first_problem(error.errors())
    return error_response(e.InvalidValue(f"{place[-1]}: {reason}", param=place[-1]))


def _envelope(message: str, kind: str, param: str | None, code: str) -> ErrorReply:
    return ErrorReply(error=ErrorDetail(message=e.plain(message), type=kind, param=param and e.plain(param), code=code))
