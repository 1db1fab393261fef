"""The errors of the server, in words for a user; `app/api/errors.py` maps their codes to HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

Code = Literal[
    "internal_error",
    # the request
    "invalid_request", "invalid_value", "unknown_parameter", "unsupported_parameter", "invalid_json", "not_acceptable",
    "unsupported_encoding", "body_too_large", "headers_too_large", "request_timeout", "invalid_api_key", "not_allowed",
    "model_not_found",
    # the load of the server
    "rate_limit_exceeded", "unavailable", "overloaded", "no_worker", "shutting_down", "deadline_exceeded", "cancelled",
    # the engine and the models
    "crashed", "non_finite_output", "insufficient_gpu_memory", "model_load_failed", "model_not_downloaded",
    "lora_load_failed",
]  # fmt: skip
"""What went wrong, as a word for programs: in the answer, the log and the metrics."""


def plain(text: str) -> str:
    """Text that UTF-8 can hold: the name of a file or of an unknown field may have a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def first_problem(
    errors: Sequence[Mapping[str, Any]], words: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], str]:
    """Where the first of pydantic's errors is, name by name, and what is wrong there; words: of ours, by error type."""
    first = errors[0]
    ours = (words or {}).get(first["type"])
    reason = ours.format(**first.get("ctx", {})) if ours else first["msg"]
    return tuple(map(str, first["loc"])), reason.removeprefix("Value error, ")


class InstepError(Exception):
    """The root. `message` is fit for a user's eyes; `param` names the field; `retry_after` is in seconds.

    A class has a code, which its subclasses inherit and an error may narrow. Errors cross the process border by pickle,
    so every subclass keeps this constructor.
    """

    code: Code = "internal_error"

    def __init_subclass__(cls, code: Code | None = None) -> None:
        cls.code = code or cls.code

    def __init__(
        self, message: str, *, code: Code | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = plain(message)
        self.code = code or self.code
        self.param = param
        self.retry_after = retry_after

    def again(self, message: str | None = None, param: str | None = None) -> Self:
        """A new error like this one, but for what is named, and without its traceback, which holds tensors."""
        message, param = message or self.message, param or self.param
        return type(self)(message, code=self.code, param=param, retry_after=self.retry_after)


class RequestError(InstepError, code="invalid_request"):
    """The request cannot be served as written, or not with this key."""


class InvalidValue(RequestError, code="invalid_value"):
    """A field is out of its range or of the wrong type."""


class ModelNotFound(InstepError, code="model_not_found"):
    """No card has this name, or none that this key may use: both in the same words."""


class RateLimited(InstepError, code="rate_limit_exceeded"):
    """This key has more than its share of device seconds in the queue; retry_after says when it may have less."""


class Unavailable(InstepError, code="unavailable"):
    """This replica cannot serve now: it is overloaded, drains, or has no engine. Another or a later try may succeed."""


class DeadlineExceeded(InstepError, code="deadline_exceeded"):
    """The deadline passed before the image was done."""


class Cancelled(InstepError, code="cancelled"):
    """The client left or cancelled."""


class EngineError(InstepError):
    """The request reached the engine and failed there, as by a NaN or an infinity in its image."""


class OutOfMemory(EngineError, code="insufficient_gpu_memory"):
    """One row alone does not fit in the device's memory."""


class LoadError(InstepError, code="model_load_failed"):
    """A model cannot be loaded, or its parts do not fit the device together."""


class CardError(LoadError):
    """A card.toml is invalid; the message names the file and the field."""


class CheckpointError(LoadError):
    """The checkpoint's files are missing, truncated, or not what the card says."""


class NotDownloaded(CheckpointError, code="model_not_downloaded"):
    """The card's Hub repository is not in the local cache; the message has the command that gets it."""


class SettingsError(InstepError):
    """The server cannot start with these settings."""
