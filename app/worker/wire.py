"""Wire: the messages that cross the process border, and how they cross: length-framed pickles over a socketpair.

Knows nothing of processes, queues or retries; both ends are ours, so pickle carries no stranger's bytes.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from app.cards.card import Card
from app.errors import InstepError
from app.report import Report
from app.request import Request
from app.settings import Settings

FRAME_CAP = 512 * 1024 * 1024
"""Bytes a frame may have: an 8192 x 8192 image is 201 MB and its latent 67 MB; anything longer is a broken stream."""

_HEADER = struct.Struct("!Q")
_SCRATCH = 64 * 1024


class WireError(Exception):
    """The stream is broken: a frame over the cap, cut off in the middle, or not a message."""


@dataclass(frozen=True, slots=True)
class Start:
    """First order to a worker: everything it needs to build its pool and engine."""

    settings: Settings
    cards: dict[str, Card]
    device: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Begin this request; a Result for each image or one Failure answers it."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop this request at the next step boundary; unknown or finished ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Load:
    """Begin to load this model; ModelState tells how it goes."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Take this model off the device once no request holds it; ModelState tells when it is gone."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process; `drain` finishes what was submitted first."""

    drain: bool


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of a worker that is able to work: device, pool and engine stand. No model need be loaded."""

    pid: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Only word of a worker that cannot work with what Start said; it ends after this."""

    error: InstepError


Order = Start | Submit | Cancel | Load | Unload | Stop
Word = Hello | Refusal | Report


def pack(message: Order | Word) -> bytes:
    """One frame: eight bytes of length, big-endian, then the pickle. Raises WireError above FRAME_CAP."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    if len(body) > FRAME_CAP:
        raise WireError(f"a frame of {len(body)} bytes is over the cap of {FRAME_CAP}")
    return _HEADER.pack(len(body)) + body


def send(sock: socket.socket, *messages: Order | Word) -> None:
    """Blocking send of one frame each, in one piece.

    Raises OSError when the other side is gone, WireError above FRAME_CAP.
    """
    sock.sendall(b"".join(map(pack, messages)))


def receive(sock: socket.socket) -> Order | None:
    """Blocking receive of one order; None when the other side is gone. Raises WireError on a broken stream."""
    header = _receive_exactly(sock, _HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(sock, _length(header))
    return None if body is None else cast(Order, _unpack(body))


class Receiver(asyncio.BufferedProtocol):
    """The front's end of the stream: `hear` gets each message, on the event loop, as soon as it is whole.

    `ended` is done when the other side is gone, also in the middle of a frame; its exception is the WireError of a
    broken stream. Large frames are received straight into their own buffer, without the copies of a StreamReader:
    a picture of 3 MB keeps the event loop for 2 ms.
    """

    def __init__(self, hear: Callable[[Word], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._body: memoryview | None = None
        self._filled = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go; called by the transport."""
        return (self._scratch if self._body is None else self._body)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """That many bytes have come; called by the transport. After an error nothing more is read from them."""
        if self.ended.done():
            return
        self._filled += nbytes
        try:
            if self._body is None:
                self._take_small()
            elif self._filled == len(self._body):
                body, self._body, self._filled = self._body, None, 0
                self._hear(cast(Word, _unpack(body)))
        except WireError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side is gone; called by the transport."""
        self._end(None)

    def _take_small(self) -> None:
        """Every whole frame in the scratch buffer; the first that does not fit there gets a buffer of its own."""
        start = 0
        while self._filled - start >= _HEADER.size and not self.ended.done():
            body = start + _HEADER.size
            end = body + _length(self._scratch[start:body])
            if end > self._filled:
                if end - start > _SCRATCH:
                    self._body = memoryview(bytearray(end - body))
                    self._filled -= body
                    self._body[: self._filled] = self._scratch[body : body + self._filled]
                    return
                break
            self._hear(cast(Word, _unpack(self._scratch[body:end])))
            start = end
        left = self._filled - start
        self._scratch[:left] = bytes(self._scratch[start : self._filled])
        self._filled = left

    def _end(self, error: WireError | None) -> None:
        if self.ended.done():
            return
        self._body, self._filled = None, 0
        if error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)


def _length(header: bytearray | memoryview) -> int:
    length = int(_HEADER.unpack(header)[0])
    if length > FRAME_CAP:
        raise WireError(f"a frame of {length} bytes is over the cap of {FRAME_CAP}")
    return length


def _unpack(body: bytearray | memoryview) -> object:
    try:
        return pickle.loads(body)
    except Exception as error:
        raise WireError(f"a frame of {len(body)} bytes is not a message: {error}") from error


def _receive_exactly(sock: socket.socket, count: int) -> bytearray | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        try:
            got = sock.recv_into(view)
        except ConnectionError:
            return None
        if not got:
            return None
        view = view[got:]
    return buffer
