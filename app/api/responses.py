"""Responses: the one table from our errors to HTTP, the OpenAI error envelope, and what an Accept header asks for.

Knows nothing of images or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app import errors as e
from app.imaging import FORMATS, Format


@dataclass(frozen=True)
class Told:
    """How a class of error is told. should_retry: the x-should-retry header of OpenAI's client, None for its own
    rule (it retries 408, 409, 429 and 5xx). text: said instead of the error's own message. headers: further ones."""

    status: int
    kind: str
    should_retry: bool | None = None
    text: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_BAD = "invalid_request_error"
_INTERNAL = Told(500, "server_error", False, "The server failed on this request.")

TABLE: dict[type[e.InstepError], Told] = {
    e.InstepError: _INTERNAL,
    e.RequestError: Told(400, _BAD),
    e.InvalidValue: Told(400, _BAD),
    e.UnknownField: Told(400, _BAD),
    e.Unsupported: Told(400, _BAD),
    e.InvalidJSON: Told(400, _BAD),
    e.NotAcceptable: Told(406, _BAD),
    e.UnsupportedEncoding: Told(415, _BAD, headers={"Accept-Encoding": "identity"}),
    e.BodyTooLarge: Told(413, _BAD),
    e.HeadersTooLarge: Told(431, _BAD, False),
    e.RequestTimeout: Told(408, _BAD),
    e.ModelNotFound: Told(404, _BAD),
    e.Unauthorized: Told(401, _BAD, False, headers={"WWW-Authenticate": "Bearer"}),
    e.Forbidden: Told(403, "permission_error", False),
    e.RateLimited: Told(429, "rate_limit_error", True),
    e.Unavailable: Told(503, "server_error", True),
    e.Overloaded: Told(503, "server_error", True),
    e.NoWorker: Told(503, "server_error", True),
    e.ShuttingDown: Told(503, "server_error", True),
    e.DeadlineExceeded: Told(504, "server_error", False),
    e.Cancelled: Told(499, _BAD, False),
    e.EngineError: _INTERNAL,
    e.NonFiniteOutput: Told(
        500,
        "server_error",
        False,
        "This image came out as numbers that are not finite.",
    ),
    e.OutOfMemory: Told(507, "server_error", False),
    e.LoadError: Told(503, "server_error", False, "This model cannot be loaded."),
    e.CardError: Told(503, "server_error", False, "This model cannot be loaded."),
    e.CheckpointError: Told(503, "server_error", False, "This model cannot be loaded."),
    e.NotDownloaded: Told(503, "server_error", False),
    e.DoesNotFit: Told(507, "server_error", False),
    e.SettingsError: _INTERNAL,
}
"""Every class of app/errors.py. Load errors name the server's files, which are for its log and /v1/models only."""

RANGES = 32
"""Media ranges of an Accept header, and parameters of one, that are looked at; browsers send ten."""

RETRY_AFTER = (1, 120)
"""Seconds that Retry-After may say: above 120 OpenAI's client gives up at once."""


class ErrorDetail(BaseModel):
    """What went wrong: `param` is the field, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """OpenAI's error envelope; every error of this server has this shape."""

    error: ErrorDetail


def told(error: e.InstepError) -> Told:
    """The table's entry for this error's class, or its nearest ancestor's."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def envelope(error: e.InstepError) -> ErrorReply:
    """The body that tells this error."""
    entry = told(error)
    return _envelope(entry.text or error.message, entry.kind, error.param, error.code)


def error_response(error: e.InstepError) -> Response:
    """The whole answer: status, envelope and headers; Retry-After for what passes, x-should-retry where it matters."""
    entry = told(error)
    headers = dict(entry.headers)
    if isinstance(error, e.Unavailable | e.RateLimited):
        low, high = RETRY_AFTER
        headers["Retry-After"] = str(min(high, max(low, math.ceil(error.retry_after or low))))
    if entry.should_retry is not None:
        headers["x-should-retry"] = "true" if entry.should_retry else "false"
    return JSONResponse(envelope(error).model_dump(), entry.status, headers)


def http_error_response(error: HTTPException) -> Response:
    """The framework's own refusals (no such route, wrong method) in the same envelope."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = _envelope(str(error.detail), _BAD, None, code)
    response = JSONResponse(body.model_dump(), error.status_code, error.headers)
    if "GET" in response.headers.get("allow", "").split(", "):
        response.headers["allow"] += ", HEAD"
    return response


def accepted_format(request: Request, preferred: str | None = None) -> Format | None:
    """The image format that Accept prefers over JSON; None for JSON, also when Accept names neither.

    As RFC 9110 section 12.5.1: of each type the most specific range counts. Ranges of one weight go in their order;
    one that takes several types (`image/*`) gives JSON, then the `preferred` format, then PNG. Raises NotAcceptable:
    Accept names images alone, and none that is written here.
    """
    ranges = _ranges(",".join(request.headers.getlist("accept")))
    offers: list[Format | None] = [None, *sorted(FORMATS, key=lambda format: format != preferred)]
    ranked = [(*_rank(ranges, offer), order) for order, offer in enumerate(offers)]
    weight, _, order = min(ranked)
    if weight < 0:
        return offers[order]
    if any(media.startswith("image/") and weight < 0 for media, (weight, _) in ranges.items()):
        types = ", ".join(f"image/{format}" for format in FORMATS)
        raise e.NotAcceptable(f"Accept: no such image type is written here; there are {types} and application/json")
    return None


def _ranges(accept: str) -> dict[str, tuple[float, int]]:
    """The media ranges of an Accept header in lower case, without parameters: (minus its weight, its place)."""
    found: dict[str, tuple[float, int]] = {}
    for place, part in enumerate(accept.lower().split(",", RANGES)[:RANGES]):
        media, *options = (piece.strip() for piece in part.split(";", RANGES))
        weight = next((_quality(option[2:]) for option in options if option.startswith("q=")), 1.0)
        found.setdefault(media, (-weight, place))
    return found


def _rank(ranges: Mapping[str, tuple[float, int]], offer: Format | None) -> tuple[float, int]:
    """Of the most specific range that takes this offer; a weight of 0 where none does."""
    kind, name = ("image", offer) if offer else ("application", "json")
    return next((ranges[media] for media in (f"{kind}/{name}", f"{kind}/*", "*/*") if media in ranges), (0.0, 0))


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _envelope(message: str, kind: str, param: str | None, code: str) -> ErrorReply:
    return ErrorReply(error=ErrorDetail(message=e.plain(message), type=kind, param=param and e.plain(param), code=code))
