"""The tree of everything that can go wrong, in words for a user; `app/api/errors.py` maps its classes to HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


def plain(text: str) -> str:
    """Text that UTF-8 can hold: the name of a file or of an unknown field may have a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def first_problem(
    errors: Sequence[Mapping[str, Any]], words: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], str]:
    """Where the first of pydantic's errors is, name by name, and what is wrong there; words: of ours, by error type."""
    first = errors[0]
    reason = (words or {}).get(first["type"], first["msg"])
    return tuple(map(str, first["loc"])), reason.removeprefix("Value error, ")


class InstepError(Exception):
    """The root. `message` is fit for a user's eyes; `param` names the field; `retry_after` is in seconds.

    `code` is a word for programs, in the answer, the log and the metrics; a class without one has its parent's. Errors
    cross the process border by pickle, so every subclass keeps this constructor.
    """

    code: ClassVar[str] = "internal_error"

    def __init_subclass__(cls, code: str = "") -> None:
        cls.code = code or cls.code

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = plain(message)
        self.param = param
        self.retry_after = retry_after


class RequestError(InstepError, code="invalid_request"):
    """The request cannot be served as written."""


class InvalidValue(RequestError, code="invalid_value"):
    """A field is out of its range or of the wrong type."""


class UnknownField(RequestError, code="unknown_parameter"):
    """A field that does not exist; the message offers the nearest name."""


class Unsupported(RequestError, code="unsupported_parameter"):
    """An OpenAI feature that this server does not serve."""


class InvalidJSON(RequestError, code="invalid_json"):
    """The body is not a JSON object."""


class NotAcceptable(RequestError, code="not_acceptable"):
    """The Accept header names no image format that this server writes; the message lists those that it does."""


class UnsupportedEncoding(RequestError, code="unsupported_encoding"):
    """The body has a Content-Encoding, such as gzip, which the message names."""


class BodyTooLarge(RequestError, code="body_too_large"):
    """The body is over the limit."""


class HeadersTooLarge(RequestError, code="headers_too_large"):
    """The headers are over the limit in bytes or in number."""


class RequestTimeout(RequestError, code="request_timeout"):
    """The request did not come whole within REQUEST_TIMEOUT, or its headers within 10 seconds."""


class ModelNotFound(InstepError, code="model_not_found"):
    """No card has this name, or none that this key may use: both in the same words."""


class Unauthorized(InstepError, code="invalid_api_key"):
    """No key, or one that this server does not know."""


class Forbidden(InstepError, code="not_allowed"):
    """This key may not do this: an admin's route."""


class RateLimited(InstepError, code="rate_limit_exceeded"):
    """This key has more than its share of device seconds in the queue; retry_after says when it may have less."""


class Unavailable(InstepError, code="unavailable"):
    """This replica cannot serve now; another replica or a later try may."""


class Overloaded(Unavailable, code="overloaded"):
    """The wait ahead is longer than MAX_WAIT."""


class NoWorker(Unavailable, code="no_worker"):
    """No engine process is alive, or it died under this request."""


class ShuttingDown(Unavailable, code="shutting_down"):
    """The server drains and takes no new requests."""


class DeadlineExceeded(InstepError, code="deadline_exceeded"):
    """The deadline passed before the image was done."""


class Cancelled(InstepError, code="cancelled"):
    """The client left or cancelled."""


class EngineError(InstepError):
    """The request reached the engine and failed there."""


class NonFiniteOutput(EngineError, code="non_finite_output"):
    """A part of the model computed NaN or infinity for this image."""


class OutOfMemory(EngineError, code="insufficient_gpu_memory"):
    """One row alone does not fit in the device's memory."""


class LoadError(InstepError, code="model_load_failed"):
    """A checkpoint cannot be loaded."""


class CardError(LoadError):
    """A card.toml is invalid; the message names the file and the field."""


class CheckpointError(LoadError):
    """The checkpoint's files are missing, truncated, or not what the card says."""


class NotDownloaded(CheckpointError, code="model_not_downloaded"):
    """The card's Hub repository is not in the local cache; the message has the command that gets it."""


class DoesNotFit(LoadError, code="insufficient_gpu_memory"):
    """Parts that must be on the device together are over the memory that weights may take; the message has both."""


class SettingsError(InstepError):
    """The server cannot start with these settings."""
