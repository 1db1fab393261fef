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

from typing import Any


class InstepError(Exception):
    """The root. `message` is fit for a user's eyes; `param` names the field; `retry_after` is in seconds.

    Instances cross the process border by pickle, so every subclass keeps this constructor.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after)


def _rebuild(kind: type[InstepError], message: str, param: str | None, retry_after: float | None) -> InstepError:
    return kind(message, param=param, retry_after=retry_after)


class RequestError(InstepError):
    """The request cannot be served as written."""


class InvalidValue(RequestError):
    """A field is out of its range or of the wrong type."""


class UnknownField(RequestError):
    """A field that does not exist; the message offers the nearest name."""


class Unsupported(RequestError):
    """An OpenAI feature that this server does not serve."""


class InvalidJSON(RequestError):
    """The body is not a JSON object."""


class NotAcceptable(RequestError):
    """No image format that the Accept header names is written here; the message has those that are."""


class UnsupportedEncoding(RequestError):
    """The body has a Content-Encoding, such as gzip, which the message names."""


class BodyTooLarge(RequestError):
    """The body is over the limit."""


class HeadersTooLarge(RequestError):
    """The headers are over the limit in bytes or in number."""


class RequestTimeout(RequestError):
    """The request did not come whole within REQUEST_TIMEOUT, or its headers within 10 seconds."""


class ModelNotFound(InstepError):
    """No card has this name, or none that this key may use: both in the same words."""


class Unauthorized(InstepError):
    """No key, or one that this server does not know."""


class Forbidden(InstepError):
    """This key may not do this: an admin's route."""


class RateLimited(InstepError):
    """This key has more than its share of device seconds in the queue; retry_after says when it may have less."""


class Unavailable(InstepError):
    """This replica cannot serve now; another replica or a later try may."""


class Overloaded(Unavailable):
    """The wait ahead is longer than MAX_WAIT."""


class NoWorker(Unavailable):
    """No engine process is alive, or it died under this request."""


class ShuttingDown(Unavailable):
    """The server drains and takes no new requests."""


class DeadlineExceeded(InstepError):
    """The deadline passed before the image was done."""


class Cancelled(InstepError):
    """The client left or cancelled."""


class EngineError(InstepError):
    """The request reached the engine and failed there."""


class NonFiniteOutput(EngineError):
    """A part of the model computed NaN or infinity for this image."""


class OutOfMemory(EngineError):
    """One row alone does not fit in the device's memory."""


class LoadError(InstepError):
    """A checkpoint cannot be loaded."""


class CardError(LoadError):
    """A card.toml is invalid; the message names the file and the field."""


class CheckpointError(LoadError):
    """The checkpoint's files are missing, truncated, or not what the card says."""


class NotDownloaded(CheckpointError):
    """The card's Hub repository is not in the local cache; the message has the command that gets it."""


class DoesNotFit(LoadError):
    """Parts that must be on the device together are over the memory that weights may take; the message has both."""


class SettingsError(InstepError):
    """The server cannot start with these settings."""
