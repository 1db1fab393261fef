"""Protocol: uvicorn's HTTP/1.1 with bounds on what one client may hold: time, headers, connections."""

from __future__ import annotations

import asyncio
import logging
import termios
from contextlib import suppress
from fcntl import ioctl
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.door import Door
from app.api.parser import EVENTS, Parser
from app.errors import InstepError, Overloaded, RequestTimeout, ShuttingDown

AHEAD = 64 * 1024
"""Bytes behind a whole request beyond which a connection is not read before it is answered."""

SLOWEST = 8 * 1024
"""Bytes a second that a client must take of its answer while it has not taken all."""

HEAD_SECONDS = 10.0
"""Seconds in which a client must send the whole head of a request, where REQUEST_TIMEOUT is not shorter still."""

LINGER = 2.0
"""Seconds of silence after which a refused client is cut off, and REQUEST_TIMEOUT where it goes on sending. NOTE: to
close on unread data resets the connection, and the answer is lost with it; so the client's rest is read and dropped."""

PROBES = (b"/healthz", b"/readyz")
"""What a connection over the caps may still ask. A crowd must not make an orchestrator restart the server, and its
probes come from an address like any other's."""

GRACE = 2.0
"""Seconds in which a connection over the caps is heard, and in which it must leave once it is refused."""

_QUIET = logging.getLogger("instep.protocol")
_QUIET.setLevel(logging.ERROR)
"""For uvicorn, which warns of every request that is refused: the metrics count them, and a crowd could fill a disk."""


class _Flow(FlowControl):
    """uvicorn reads on whenever a route asks for its body, and so would take in pipelined requests without end."""

    def __init__(self, transport: asyncio.Transport, parser: Parser) -> None:
        super().__init__(transport)
        self._parser = parser

    def resume_reading(self) -> None:
        """Read on, unless the present request is whole and much of the next ones is here already."""
        if self._parser.their_state is not h11.DONE or len(self._parser.trailing_data[0]) <= AHEAD:
            super().resume_reading()


class Guarded(H11Protocol):
    """One connection. Two timers: `_clock` while a request is on its way, `_watch` while an answer is."""

    def __init__(self, door: Door, **made: Any) -> None:
        super().__init__(**made)
        self.conn: Parser = Parser(self._fault, self._sending)
        self.logger = _QUIET
        self.address = ""
        self._door = door
        self._entered: bool | None = True
        self._refused = False
        self._still_sends = False
        self._began = 0.0
        self._clock: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._written = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the transport: a client is there, and its time runs."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.conn)
        self.address = self.client[0] if self.client else ""
        self._entered = self._door.enter(self)
        transport.abort() if self._entered is None else self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport: the client is gone."""
        self._door.leave(self)
        self._stop_clock()
        if self._watch:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the transport. What a refused client still sends is dropped."""
        if self._refused:
            self._still_sends = True
            return
        super().data_received(data)
        if not self._entered and self.cycle:
            self.cycle.keep_alive = False
        self._settle()

    def handle_events(self) -> None:
        """Called by uvicorn when there are bytes to parse. A body in chunks of a byte is parsed over many turns."""
        self.conn.left = EVENTS
        super().handle_events()
        if not self.conn.left:
            self.loop.call_soon(self._go_on)

    def on_response_complete(self) -> None:
        """Called when an answer is whole; the next request may be here already, or a part of it."""
        super().on_response_complete()
        if self.cycle and not self.cycle.response_complete:
            self.cycle.scope["state"]["pipelined"] = True
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what it takes for no HTTP."""
        self._refuse(self.conn.fault)

    def shutdown(self) -> None:
        """Called by the server when it stops; a request that is still coming would hold that up.

        NOTE: h11 does not know that we refused a request, and would raise. Whatever is raised here, and for one
        connection only, would end the drain of all.
        """
        try:
            if self.conn.coming and not self._refused:
                self._refuse(ShuttingDown("The server is shutting down.", retry_after=5.0))
            elif not self._refused:
                super().shutdown()
        except Exception:
            self.logger.exception("a connection could not be shut down and is cut off")
            self.transport.abort()

    def dismiss(self) -> bool:
        """Called by the door: another connection needs the place of this silent one.

        Returns whether it goes: not where bytes wait that we did not read yet, which may be a whole request.
        """
        if any(ioctl(self.transport.get_extra_info("socket"), termios.FIONREAD, bytes(4))):
            return False
        self.transport.close()
        return True

    def _fault(self, request: h11.Request) -> InstepError | None:
        if not self._entered and request.target not in PROBES:
            return Overloaded("Too many connections are open. Try again later.", retry_after=GRACE)
        return None

    def _settle(self) -> None:
        """The clock runs from a request's first byte to its last, whatever its client sends in between."""
        self._door.note(self, silent=self._silent)
        if self._refused:
            return
        if self.transport.is_closing() or not self.conn.coming:
            self._stop_clock()
        elif self._clock is None:
            self._start_clock()

    @property
    def _silent(self) -> bool:
        """Whether nothing is lost but a wait if this connection is closed now."""
        if self.transport.get_write_buffer_size():
            return False
        return self._refused or not self.cycle or self.cycle.response_complete

    def _go_on(self) -> None:
        if not self._refused and not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()
            self._settle()

    def _start_clock(self) -> None:
        self._began = self.loop.time()
        seconds = HEAD_SECONDS if self._entered else GRACE
        self._clock = self.loop.call_later(min(seconds, self._door.seconds), self._late)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        left = self._began + self._door.seconds - self.loop.time()
        headed = self.conn.their_state is h11.SEND_BODY
        if headed and self._entered and left > 0:
            self._clock = self.loop.call_later(left, self._late)
        elif self.conn.coming:
            what = "request" if headed else "request's headers"
            self._refuse(RequestTimeout(f"The {what} did not come whole in time."))
        else:
            self.transport.close()

    def _refuse(self, error: InstepError) -> None:
        """Tell this error where no answer has begun, and end the connection; a route at work sees its client gone."""
        self._refused = True
        self._stop_clock()
        self._unset_keepalive_if_required()
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status, headers, body = self._door.refuse(error, self.conn.asked)
            lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
            lines += [b"%s: %s" % header for header in (*self.server_state.default_headers, *headers)]
            self.transport.write(b"\r\n".join((*lines, b"connection: close", b"", body)))
        self.flow.resume_reading()
        with suppress(OSError):  # a client that reset the connection while it was not read
            self.transport.write_eof()
        self._settle()
        self._linger(self.loop.time() + (self._door.seconds if self._entered else GRACE))

    def _linger(self, until: float) -> None:
        self._still_sends = False
        self._clock = self.loop.call_later(LINGER, self._leave, until)

    def _leave(self, until: float) -> None:
        if self._still_sends and self.loop.time() < until:
            self._linger(until)
        else:
            self.transport.abort()

    def _sending(self, count: int) -> None:
        """Watch that these bytes are taken."""
        self._written += count
        if count and self._watch is None:
            self._watch_on(self._sent - count)

    @property
    def _sent(self) -> int:
        """Bytes that the system has taken from us; it takes more as the client does."""
        return self._written - self.transport.get_write_buffer_size()

    def _watch_on(self, sent: int) -> None:
        due = min(self._written, sent + int(SLOWEST * self._door.seconds))
        self._watch = self.loop.call_later(self._door.seconds, self._look, due)

    def _look(self, due: int) -> None:
        """Whether the client has taken what was due by now: nothing else would ever end a client that does not read."""
        self._watch = None
        if not self.transport.get_write_buffer_size():
            self._settle()
            return
        if self._sent < due:
            self.transport.abort()
        else:
            self._watch_on(self._sent)
