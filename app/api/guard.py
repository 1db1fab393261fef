"""Guard: uvicorn's HTTP/1.1 with limits on what one client may hold: time and connections."""

from __future__ import annotations

import asyncio
import logging
import sys
import termios
from collections import Counter
from collections.abc import Callable, Collection
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

READ = 512  # bytes of a head that are read and parsed in one turn of the event loop
READ_CHUNKS = 128  # the same, of a body in chunks: 0.15 ms where each has one byte, and a hundred clients may send them
READ_BODY = 32 * 1024  # the same, of what is left of a body or of a chunk: nothing else is parsed with it
AHEAD = 4 * 1024  # bytes behind a whole request above which a connection is not read before that request is answered
SLOWEST = 8 * 1024  # bytes a second that a client must take of an answer that waits for it, over REQUEST_TIMEOUT
HEAD_SECONDS = 10.0  # time for the whole head of a request, unless REQUEST_TIMEOUT is shorter
GRACE = 2.0  # time of a connection over the caps for its request; silence after which a refused one is closed

SPARE = 64
SPARE_EACH = 8
"""Connections over the caps that get an answer: of all addresses, and of one. Further ones are dropped. A server with a
small cap has an eighth of the cap instead."""

_QUIET = logging.getLogger("instep.protocol")
_QUIET.setLevel(logging.ERROR)
"""uvicorn logs a warning for each invalid request. The metrics count them, and a crowd could fill the disk."""


class Door:
    """The connections of one server: those within the caps, those over them, and those that are silent.

    refuse: makes the answer to a request that reaches no route, for a page of this origin.
    """

    def __init__(self, settings: Settings, refuse: Callable[[InstepError, str], Response]) -> None:
        self.seconds = settings.request_timeout
        self.refuse = refuse
        self._most, self._most_each = settings.max_connections, settings.connections_per_address
        self._within: set[Guarded] = set()
        self._over: set[Guarded] = set()
        self._silent: dict[Guarded, None] = {}  # the oldest first
        self.buffer = memoryview(bytearray(READ_BODY))  # of all: what is read into it is copied in the same turn

    def enter(self, guest: Guarded) -> bool | None:
        """Whether a new connection is within the caps; None if it must be dropped.

        At a cap, the oldest silent connection makes room.
        """
        address = guest.address
        if self._full(address):
            gone = next((old for old in self._silent_for(address) if old.dismiss()), None)
            if gone:
                self.leave(gone)
        within = not self._full(address)
        spare = min(SPARE, self._most // 8 + 1) if self._most else SPARE
        if not within and (len(self._over) >= spare or _count(self._over, address) >= SPARE_EACH):
            return None
        (self._within if within else self._over).add(guest)
        self.note(guest, silent=True)
        return within

    def note(self, guest: Guarded, *, silent: bool) -> None:
        """A connection is silent while there is no whole head of a request to answer."""
        if not silent:
            self._silent.pop(guest, None)
        elif guest in self._within:
            self._silent.setdefault(guest)

    def leave(self, guest: Guarded) -> None:
        """Forget a connection that is closed."""
        self._within.discard(guest)
        self._over.discard(guest)
        self._silent.pop(guest, None)

    def _full(self, address: str) -> bool:
        return self._full_for(address) or 0 < self._most <= len(self._within)

    def _full_for(self, address: str) -> bool:
        return 0 < self._most_each <= _count(self._within, address)

    def _silent_for(self, address: str) -> list[Guarded]:
        """Silent connections, the oldest first: of this address if it is at its own cap, else of the address that has
        the most of them, so that a crowd pushes out its own."""
        if not self._full_for(address):
            crowds = Counter(guest.address for guest in self._silent)
            address = max(crowds, key=crowds.__getitem__, default=address)
        return [guest for guest in self._silent if guest.address == address]


def _count(guests: Collection[Guarded], address: str) -> int:
    return sum(guest.address == address for guest in guests)


class _Flow(FlowControl):
    """Flow control that stops at AHEAD. uvicorn's own reads on whenever a route waits, pipelined requests too."""

    def __init__(self, transport: asyncio.Transport, parser: h11.Connection) -> None:
        super().__init__(transport)
        self._parser = parser

    def resume_reading(self) -> None:
        """Read on, unless the present request is whole and many bytes of the next ones wait already."""
        if self._parser.their_state is not h11.DONE or len(self._parser.trailing_data[0]) <= AHEAD:
            super().resume_reading()


class Guarded(H11Protocol, asyncio.BufferedProtocol):
    """One connection. `_clock` runs while a request is on its way, `_watch` while an answer waits for the client.

    A request of a connection over the caps has `crowded` in its state: `Access` answers it.
    """

    def __init__(self, door: Door, **made: Any) -> None:
        super().__init__(**made)
        self.logger = _QUIET
        self.address = ""
        self._door = door
        self._seconds = door.seconds
        self._ends = 0.0
        self._refused = False
        self._still_sends = False
        self._clock: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the transport when a client has connected."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)
        self.flow = _Flow(transport, self.conn)
        self.address = self.client[0] if self.client else ""
        within = self._door.enter(self)
        if within is None:
            transport.abort()
        elif not within:
            self._seconds = GRACE
            self.app_state = {**self.app_state, "crowded": True}
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport when the connection is closed."""
        self._door.leave(self)
        for timer in filter(None, (self._clock, self._watch)):
            timer.cancel()
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the transport before it reads. What a refused client still sends is only dropped."""
        if self._refused:
            return self._door.buffer
        if self.conn.their_state is not h11.SEND_BODY:
            return self._door.buffer[:READ]
        # NOTE: h11 has no public name for what is left; without one, reads are small.
        reader: object = getattr(self.conn, "_reader", None)
        left = getattr(reader, "_remaining", 0) or getattr(reader, "_bytes_in_chunk", 0)
        return self._door.buffer[: min(max(left, READ_CHUNKS), READ_BODY)]

    def buffer_updated(self, nbytes: int) -> None:
        """Called by the transport with the bytes that it has read."""
        if self._refused:
            self._still_sends = True
            return
        self.data_received(bytes(self._door.buffer[:nbytes]))
        self._settle()

    def pause_writing(self) -> None:
        """Called by the transport when the client does not take what is sent."""
        super().pause_writing()
        self._start_watch()

    def resume_writing(self) -> None:
        """Called by the transport when the client has taken everything."""
        super().resume_writing()
        if self._watch:
            self._watch.cancel()
        self._settle()

    def on_response_complete(self) -> None:
        """Called by uvicorn when an answer is sent; the next request may have begun to come."""
        super().on_response_complete()
        if self._answering:
            self.scope["state"]["pipelined"] = True
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error about a request."""
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self._refuse(RequestError("The headers of this request are too large.", code="headers_too_large"))
        else:
            self._refuse(RequestError("This is not a valid HTTP request."))

    def shutdown(self) -> None:
        """Called by the server when it stops. A request that is still coming would hold that up."""
        if self._refused:
            return
        if self._coming:
            self._refuse(Unavailable("The server is shutting down.", retry_after=5.0, code="shutting_down"))
        else:
            super().shutdown()

    def dismiss(self) -> bool:
        """Close this silent connection, because another one needs its place.

        Returns False, and stays open, if unread bytes wait: they may be a whole request.
        """
        if any(ioctl(self.transport.get_extra_info("socket"), termios.FIONREAD, bytes(4))):
            return False
        self.transport.close()
        return True

    @property
    def _answering(self) -> bool:
        """Whether there is a request, whole or not, and its answer has not ended."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _coming(self) -> bool:
        """Whether a request has begun to come and is not whole."""
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _settle(self) -> None:
        """Run the clock from a request's first byte to its last, and tell the door whether the client is silent."""
        answering = self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY)
        self._door.note(self, silent=not answering and not self.transport.get_write_buffer_size())
        if self._refused:
            return
        if self.transport.is_closing() or not self._coming:
            self._stop_clock()
        elif self._clock is None:
            self._start_clock()

    def _start_clock(self) -> None:
        self._ends = self.loop.time() + self._seconds
        self._clock = self.loop.call_later(min(HEAD_SECONDS, self._seconds), self._late)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        headed = self.conn.their_state is h11.SEND_BODY
        if headed and self.loop.time() < self._ends:
            self._clock = self.loop.call_at(self._ends, self._late)
        elif self._coming:
            what = "request" if headed else "request's headers"
            self._refuse(RequestError(f"The {what} did not come whole in time.", code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: InstepError) -> None:
        """Send this error if no answer has begun, and end the connection; a route at work sees its client gone.

        What the client still sends is read and dropped until it is silent: to close on unread data resets the
        connection, and the answer is lost. A server that stops waits for that too.
        """
        self._refused = True
        self._stop_clock()
        headers = dict(self.headers) if self._answering else {}
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = self._door.refuse(error, headers.get(b"origin", b"").decode("latin-1"))
            lines = [b"HTTP/1.1 %d %s" % (answer.status_code, HTTPStatus(answer.status_code).phrase.encode())]
            lines += [b"%s: %s" % header for header in (*self.server_state.default_headers, *answer.raw_headers)]
            body = b"" if self._answering and self.scope["method"] == "HEAD" else answer.body
            self.transport.write(b"\r\n".join((*lines, b"connection: close", b"", body)))
        super().connection_lost(ConnectionAbortedError())
        self.connections.add(self)
        self.transport.resume_reading()
        with suppress(OSError):  # the client has reset the connection
            self.transport.write_eof()
        self._settle()
        self._ends = self.loop.time() + self._seconds
        self._clock = self.loop.call_later(GRACE, self._leave)

    def _leave(self) -> None:
        """Close this refused connection once its client was silent for GRACE seconds, or its time is over."""
        if self._still_sends and self.loop.time() < self._ends:
            self._still_sends = False
            self._clock = self.loop.call_later(GRACE, self._leave)
        else:
            self.transport.abort()

    def _start_watch(self) -> None:
        self._watch = self.loop.call_later(self._door.seconds, self._look, self.transport.get_write_buffer_size())

    def _look(self, before: int) -> None:
        """Cut off a client that has taken next to nothing of its answer: no one else ends it."""
        if before - self.transport.get_write_buffer_size() < SLOWEST * self._door.seconds:
            self.transport.abort()
        else:
            self._start_watch()
