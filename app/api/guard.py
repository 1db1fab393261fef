"""Guard: uvicorn's HTTP/1.1 with bounds on what one client may hold: time, headers, connections."""

from __future__ import annotations

import asyncio
import logging
import termios
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from fcntl import ioctl
from http import HTTPStatus
from typing import Any

import h11
from starlette.responses import Response
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.errors import InstepError, RequestError, Unavailable
from app.settings import Settings

HEADERS = 100  # header lines of a request
HEADER_BYTES = 32 * 1024  # of a request's target and headers together
EVENTS = 16  # heads, chunks and ends of one connection that a turn of the event loop parses; a chunk takes 7 us
AHEAD = 64 * 1024  # bytes behind a whole request beyond which a connection is not read before it is answered
SLOWEST = 8 * 1024  # bytes a second that a client must take of an answer that waits for it, over REQUEST_TIMEOUT
HEAD_SECONDS = 10.0  # in which a client must send the whole head of a request, if REQUEST_TIMEOUT is not shorter still

LINGER = 2.0
"""Seconds of silence after which a refused client is cut off, and REQUEST_TIMEOUT where it goes on sending. NOTE: to
close on unread data resets the connection, and the answer is lost with it; so the client's rest is read and dropped."""

SPARE = 64
SPARE_EACH = 8
"""Connections over the caps that are heard at all, of all addresses and of one. Further ones are dropped without a
word. A server with a small cap has fewer spare ones, an eighth of the cap."""

PROBES = (b"/healthz", b"/readyz")
"""Paths that a connection over the caps may still ask for. A crowd must not make an orchestrator restart the server,
and its probes come from an address like any other's."""

GRACE = 2.0  # seconds in which a connection over the caps is heard, and in which it must leave once it is refused

_TOO_LARGE = f"A request may have {HEADERS} headers and {HEADER_BYTES} bytes of them."

_QUIET = logging.getLogger("instep.protocol")
_QUIET.setLevel(logging.ERROR)
"""Silences uvicorn, which warns of each refused request: the metrics count them, and a crowd could fill a disk."""


class Door:
    """The connections of one server, counted by address: who is within the caps, over them, or silent.

    refuse: the answer to a request that no route sees, for a page of this origin.
    """

    def __init__(self, settings: Settings, refuse: Callable[[InstepError, bytes], Response]) -> None:
        self.seconds = settings.request_timeout
        self.refuse = refuse
        self._most, self._most_each = settings.max_connections, settings.connections_per_address
        self._within: dict[Guarded, bool] = {}
        self._counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        self._silent: dict[str, dict[Guarded, None]] = {}

    def enter(self, guest: Guarded) -> bool | None:
        """Whether a new connection is within the caps; None if it is not to be heard at all.

        At a cap the oldest silent connection that agrees to be dismissed makes room for it.
        """
        address, over = guest.address, self._counts[False]
        if self._full(address) and (gone := next((old for old in self._silent_for(address) if old.dismiss()), None)):
            self.leave(gone)
        within = not self._full(address)
        spare = min(SPARE, self._most // 8 + 1) if self._most else SPARE
        if not within and (over.total() >= spare or over[address] >= SPARE_EACH):
            return None
        self._within[guest] = within
        self._counts[within][address] += 1
        self.note(guest, silent=True)
        return within

    def note(self, guest: Guarded, *, silent: bool) -> None:
        """A connection within the caps is silent while there is no whole head of a request to answer."""
        if not self._within.get(guest):
            return
        crowd = self._silent.setdefault(guest.address, {})
        if silent:
            crowd.setdefault(guest)
        else:
            crowd.pop(guest, None)
        if not crowd:
            del self._silent[guest.address]

    def leave(self, guest: Guarded) -> None:
        """The connection is gone, or was asked to go."""
        self.note(guest, silent=False)
        if (within := self._within.pop(guest, None)) is None:
            return
        counts = self._counts[within]
        counts[guest.address] -= 1
        if not counts[guest.address]:
            del counts[guest.address]

    def _full(self, address: str) -> bool:
        return self._full_of(address) or 0 < self._most <= self._counts[True].total()

    def _full_of(self, address: str) -> bool:
        return 0 < self._most_each <= self._counts[True][address]

    def _silent_for(self, address: str) -> Iterable[Guarded]:
        """Silent connections, the oldest first: of this address if that is at its own cap, else of the address that
        has most of them, so that a crowd pushes out its own."""
        crowds = self._silent
        return (crowds.get(address) if self._full_of(address) else max(crowds.values(), key=len, default=None)) or ()


class Parser(h11.Connection):
    """h11 that checks the head of each request and counts what it parses.

    check: why a request is refused. method, origin: of the present request, once its head has come. fault: the error
    for it. left: events to parse in this turn of the event loop.
    """

    def __init__(self, check: Callable[[h11.Request], InstepError | None]) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self.fault: InstepError | None = None
        self.method = self.origin = b""
        self.left = EVENTS
        self._check = check

    def next_event(self) -> Any:
        """PAUSED when none is `left`. Raises RemoteProtocolError for a request that is refused, too."""
        if not self.left:
            return h11.PAUSED
        self.left -= 1
        if self.their_state is h11.IDLE:
            self.method = self.origin = b""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
                self.fault = RequestError(_TOO_LARGE, code="headers_too_large")
            raise
        if isinstance(event, h11.Request):
            self.method, self.origin = event.method, dict(event.headers).get(b"origin", b"")
            if fault := _size_fault(event) or self._check(event) or _framing_fault(event):
                self.fault = fault
                raise h11.RemoteProtocolError(fault.message)
        return event

    @property
    def coming(self) -> bool:
        """Whether a request has begun to come and is not whole."""
        return self.their_state is h11.SEND_BODY or (self.their_state is h11.IDLE and bool(self.trailing_data[0]))


def _size_fault(request: h11.Request) -> RequestError | None:
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(request.headers) > HEADERS or size > HEADER_BYTES:
        return RequestError(_TOO_LARGE, code="headers_too_large")
    return None


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


class _Flow(FlowControl):
    """Flow control that stops at AHEAD: uvicorn reads on whenever a route asks for its body, pipelined requests too."""

    def __init__(self, transport: asyncio.Transport, parser: Parser) -> None:
        super().__init__(transport)
        self._parser = parser

    def resume_reading(self) -> None:
        """Read on, unless the present request is whole and much of the next ones is here already."""
        if self._parser.their_state is not h11.DONE or len(self._parser.trailing_data[0]) <= AHEAD:
            super().resume_reading()


class Guarded(H11Protocol):
    """One connection. It has two timers: `_clock` while a request is on its way, `_watch` while an answer is."""

    def __init__(self, door: Door, **made: Any) -> None:
        super().__init__(**made)
        self.conn: Parser = Parser(self._fault)
        self.logger = _QUIET
        self.address = ""
        self._door = door
        self._within: bool | None = True
        self._refused = False
        self._still_sends = False
        self._began = 0.0
        self._clock: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the transport: a client is there, and its time runs."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)
        self.flow = _Flow(transport, self.conn)
        self.address = self.client[0] if self.client else ""
        self._within = self._door.enter(self)
        transport.abort() if self._within is None else self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport: the client is gone."""
        self._door.leave(self)
        self._stop_clock()
        self._stop_watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the transport. What a refused client still sends is dropped."""
        if self._refused:
            self._still_sends = True
            return
        super().data_received(data)
        if not self._within and self.cycle:
            self.cycle.keep_alive = False
        self._settle()

    def pause_writing(self) -> None:
        """Called by the transport when there are bytes that the system does not take, since the client does not."""
        super().pause_writing()
        self._start_watch()

    def resume_writing(self) -> None:
        """Called by the transport when all bytes are taken."""
        super().resume_writing()
        self._stop_watch()
        self._settle()

    def handle_events(self) -> None:
        """Called by uvicorn when there are bytes to parse. A body in chunks of a byte is parsed over many turns."""
        self.conn.left = EVENTS
        super().handle_events()
        if not self.conn.left:
            self.loop.call_soon(self._go_on)

    def on_response_complete(self) -> None:
        """Called by uvicorn when an answer is sent; the next request may be here already, or a part of it."""
        super().on_response_complete()
        if self.cycle and not self.cycle.response_complete:
            self.cycle.scope["state"]["pipelined"] = True
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser raised."""
        self._refuse(self.conn.fault or RequestError("This is not a valid HTTP request."))

    def shutdown(self) -> None:
        """Called by the server when it stops; a request that is still coming would hold that up.

        NOTE: h11 does not know that we refused a request, and would raise. An error here, on one connection, would end
        the drain of all.
        """
        try:
            if self.conn.coming and not self._refused:
                self._refuse(Unavailable("The server is shutting down.", retry_after=5.0, code="shutting_down"))
            elif not self._refused:
                super().shutdown()
        except Exception:
            self.logger.exception("a connection could not be shut down and is cut off")
            self.transport.abort()

    def dismiss(self) -> bool:
        """Called by the door when another connection needs the place of this silent one.

        Returns whether it goes: not if bytes wait that we did not read yet, which may be a whole request.
        """
        if any(ioctl(self.transport.get_extra_info("socket"), termios.FIONREAD, bytes(4))):
            return False
        self.transport.close()
        return True

    def _fault(self, request: h11.Request) -> InstepError | None:
        if not self._within and request.target not in PROBES:
            return Unavailable("Too many connections are open. Try again later.", retry_after=GRACE, code="overloaded")
        return None

    def _settle(self) -> None:
        """Run the clock from a request's first byte to its last, and tell the door whether the client is silent."""
        answered = self._refused or not self.cycle or self.cycle.response_complete
        self._door.note(self, silent=answered and not self.transport.get_write_buffer_size())
        if self._refused:
            return
        if self.transport.is_closing() or not self.conn.coming:
            self._stop_clock()
        elif self._clock is None:
            self._start_clock()

    def _go_on(self) -> None:
        if not self._refused and not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()
            self._settle()

    def _start_clock(self) -> None:
        self._began = self.loop.time()
        seconds = HEAD_SECONDS if self._within else GRACE
        self._clock = self.loop.call_later(min(seconds, self._door.seconds), self._late)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        left = self._began + self._door.seconds - self.loop.time()
        headed = self.conn.their_state is h11.SEND_BODY
        if headed and self._within and left > 0:
            self._clock = self.loop.call_later(left, self._late)
        elif self.conn.coming:
            what = "request" if headed else "request's headers"
            self._refuse(RequestError(f"The {what} did not come whole in time.", code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: InstepError) -> None:
        """Send this error if no answer has begun, and end the connection; a route at work sees its client gone."""
        self._refused = True
        self._stop_clock()
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = self._door.refuse(error, self.conn.origin)
            status, body = HTTPStatus(answer.status_code), b"" if self.conn.method == b"HEAD" else answer.body
            lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
            lines += [b"%s: %s" % header for header in (*self.server_state.default_headers, *answer.raw_headers)]
            self.transport.write(b"\r\n".join((*lines, b"connection: close", b"", body)))
        self.flow.resume_reading()
        with suppress(OSError):  # a client that reset the connection while it was not read
            self.transport.write_eof()
        self._settle()
        self._linger(self.loop.time() + (self._door.seconds if self._within else GRACE))

    def _linger(self, until: float) -> None:
        self._still_sends = False
        self._clock = self.loop.call_later(LINGER, self._leave, until)

    def _leave(self, until: float) -> None:
        if self._still_sends and self.loop.time() < until:
            self._linger(until)
        else:
            self.transport.abort()

    def _start_watch(self) -> None:
        self._watch = self.loop.call_later(self._door.seconds, self._look, self.transport.get_write_buffer_size())

    def _stop_watch(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._watch = None

    def _look(self, before: int) -> None:
        """Cut off a client that has taken nothing of its answer, or next to nothing: no one else ends it."""
        if before - self.transport.get_write_buffer_size() < SLOWEST * self._door.seconds:
            self.transport.abort()
        else:
            self._start_watch()
