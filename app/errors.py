"""The tree of everything that can go wrong, as a user is told of it.

Knows nothing of HTTP: `app/api/responses.py` holds the one table from these classes to status codes.

    InstepError
    ├── RequestError            the request cannot be served as written
    │   ├── InvalidValue        a field is out of its range or of the wrong type
    │   ├── UnknownField        a field that does not exist
    │   ├── Unsupported         an OpenAI feature that this server does not serve
    │   ├── InvalidJSON         the body is not a JSON object
    │   ├── NotAcceptable       no image format that the Accept header names is written here
    │   ├── UnsupportedEncoding the body is compressed or otherwise encoded
    │   ├── BodyTooLarge        the body is over the limit
    │   ├── HeadersTooLarge     the headers are over the limit, or too many
    │   └── RequestTimeout      it did not come whole in time
    ├── ModelNotFound           no card has this name, or none that this key may use
    ├── Unauthorized            no key, or one that this server does not know
    ├── Forbidden               this key may not do this
    ├── RateLimited             this key has more than its share in the queue
    ├── Unavailable             this replica cannot, another or a later try may
    │   ├── Overloaded          the wait ahead is longer than MAX_WAIT
    │   ├── NoWorker            no engine process is alive, or it died under this request
    │   └── ShuttingDown        the server drains
    ├── DeadlineExceeded        the deadline passed before the image was done
    ├── Cancelled               the client left or cancelled
    ├── EngineError             the request reached the engine and failed there
    │   ├── NonFiniteOutput     a part of the model computed NaN or infinity for this image
    │   └── OutOfMemory         one row alone does not fit
    ├── LoadError               a checkpoint cannot be loaded
    │   ├── CardError           a card.toml is invalid: names file and field
    │   ├── CheckpointError     the files are missing, truncated, or not what the card says
    │   └── DoesNotFit          its largest part is over the memory that weights may take
    └── SettingsError           the server cannot start with these settings
"""

from __future__ import annotations

from typing import Any, ClassVar


def plain(text: str) -> str:
    """Text that UTF-8 can hold: the name of a file or of an unknown field may have a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class InstepError(Exception):
    """The root. `message` is fit for a user's eyes; `param` names the field; `retry_after` is in seconds.

    Instances cross the process border by pickle, so every subclass keeps this constructor. `code` is a word for
    programs, in the answer, the log and the metrics; a class without one has its parent's.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = plain(message)
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after)


def _rebuild(kind: type[InstepError], message: str, param: str | None, retry_after: float | None) -> InstepError:
    return kind(message, param=param, retry_after=retry_after)


class RequestError(InstepError):
    """The request cannot be served as written."""

    code = "invalid_request"


class InvalidValue(RequestError):
    """A field is out of its range or of the wrong type."""

    code = "invalid_value"


class UnknownField(RequestError):
    """A field that does not exist; the message offers the nearest name."""

    code = "unknown_parameter"


class Unsupported(RequestError):
    """An OpenAI feature that this server does not serve."""

    code = "unsupported_parameter"


class InvalidJSON(RequestError):
    """The body is not a JSON object."""

    code = "invalid_json"


class NotAcceptable(RequestError):
    """No image format that the Accept header names is written here; the message has those that are."""

    code = "not_acceptable"


class UnsupportedEncoding(RequestError):
    """The body has a Content-Encoding, such as gzip, which the message names."""

    code = "unsupported_encoding"


class BodyTooLarge(RequestError):
    """The body is over the limit."""

    code = "body_too_large"


class HeadersTooLarge(RequestError):
    """The headers are over the limit in bytes or in number."""

    code = "headers_too_large"


class RequestTimeout(RequestError):
    """The request did not come whole within REQUEST_TIMEOUT, or its headers within 10 seconds."""

    code = "request_timeout"


class ModelNotFound(InstepError):
    """No card has this name, or none that this key may use: both in the same words."""

    code = "model_not_found"


class Unauthorized(InstepError):
    """No key, or one that this server does not know."""

    code = "invalid_api_key"


class Forbidden(InstepError):
    """This key may not do this: an admin's route."""

    code = "not_allowed"


class RateLimited(InstepError):
    """This key has more than its share of device seconds in the queue; retry_after says when it may have less."""

    code = "rate_limit_exceeded"


class Unavailable(InstepError):
    """This replica cannot serve now; another replica or a later try may."""

    code = "unavailable"


class Overloaded(Unavailable):
    """The wait ahead is longer than MAX_WAIT."""

    code = "overloaded"


class NoWorker(Unavailable):
    """No engine process is alive, or it died under this request."""

    code = "no_worker"


class ShuttingDown(Unavailable):
    """The server drains and takes no new requests."""

    code = "shutting_down"


class DeadlineExceeded(InstepError):
    """The deadline passed before the image was done."""

    code = "deadline_exceeded"


class Cancelled(InstepError):
    """The client left or cancelled."""

    code = "cancelled"


class EngineError(InstepError):
    """The request reached the engine and failed there."""


class NonFiniteOutput(EngineError):
    """A part of the model computed NaN or infinity for this image."""

    code = "non_finite_output"


class OutOfMemory(EngineError):
    """One row alone does not fit in the device's memory."""

    code = "insufficient_gpu_memory"


class LoadError(InstepError):
    """A checkpoint cannot be loaded."""

    code = "model_load_failed"


class CardError(LoadError):
    """A card.toml is invalid; the message names the file and the field."""


class CheckpointError(LoadError):
    """The checkpoint's files are missing, truncated, or not what the card says."""


class NotDownloaded(CheckpointError):
    """The card's Hub repository is not in the local cache; the message has the command that gets it."""

    code = "model_not_downloaded"


class DoesNotFit(LoadError):
    """Parts that must be on the device together are over the memory that weights may take; the message has both."""

    code = "insufficient_gpu_memory"


class SettingsError(InstepError):
    """The server cannot start with these settings."""
