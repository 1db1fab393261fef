"""Parser: h11 with bounds on a request's headers, and stricter about where a request ends."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11

from app.api.door import NOTHING, Asked
from app.errors import HeadersTooLarge, InstepError, RequestError

EVENTS = 16
"""Heads, chunks and ends of one connection that a turn of the event loop parses; a chunk takes 7 us."""

HEADERS = 100
"""Header lines that a request may have."""

HEADER_BYTES = 32 * 1024
"""Bytes of a request's target and headers together."""

_TOO_LARGE = f"A request may have {HEADERS} headers and {HEADER_BYTES} bytes of them."


class Parser(h11.Connection):
    """h11 with an eye on each request and on each byte that goes out.

    asked: the present request, once its head has come. fault: what was wrong with it. left: events that it may still
    give in this turn of the event loop.
    """

    def __init__(self, check: Callable[[h11.Request], InstepError | None], sending: Callable[[int], None]) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self.fault: InstepError = RequestError("This is not a valid HTTP request.")
        self.asked = NOTHING
        self.left = EVENTS
        self._checks = (_size_fault, check, _framing_fault)
        self._sending = sending

    def next_event(self) -> Any:
        """PAUSED when none is `left`. Raises RemoteProtocolError for a request that `check` finds fault with, too."""
        if not self.left:
            return h11.PAUSED
        self.left -= 1
        self.asked = NOTHING if self.their_state is h11.IDLE else self.asked
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
                self.fault = HeadersTooLarge(_TOO_LARGE)
            raise
        if isinstance(event, h11.Request):
            self.asked = Asked(event.method, dict(event.headers).get(b"origin", b""))
            for fault in filter(None, (check(event) for check in self._checks)):
                self.fault = fault
                raise h11.RemoteProtocolError(fault.message)
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """What goes out for this event."""
        pieces = super().send_with_data_passthrough(event)
        self._sending(sum(map(len, pieces or ())))
        return pieces

    @property
    def coming(self) -> bool:
        """Whether a request has begun to come and is not whole."""
        return self.their_state is h11.SEND_BODY or (self.their_state is h11.IDLE and bool(self.trailing_data[0]))


def _size_fault(request: h11.Request) -> HeadersTooLarge | None:
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    return HeadersTooLarge(_TOO_LARGE) if len(request.headers) > HEADERS or size > HEADER_BYTES else None


def _framing_fault(request: h11.Request) -> RequestError | None:
    """Whether a proxy may see another end of this request than h11 does, and with it another next request.

    h11 itself refuses two lengths that differ, and every Transfer-Encoding but "chunked". RFC 9112, 6.1.
    """
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return None
    if b"content-length" in names:
        return RequestError("A request has either Content-Length or Transfer-Encoding, never both.")
    if request.http_version < b"1.1":
        return RequestError("HTTP/1.0 has no Transfer-Encoding.")
    return None
