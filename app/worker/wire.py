"""Wire: the messages that cross the process border, and how they cross: length-framed pickles over a socketpair.

Knows nothing of processes, queues or retries; both ends are ours, so pickle carries no stranger's bytes.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import cast

from app.card import Card
from app.errors import InstepError
from app.report import Report
from app.request import Request
from app.settings import Settings

FRAME_CAP = 512 * 1024 * 1024
"""Bytes a frame may have: an 8192 x 8192 image is 201 MB and its latent 67 MB; anything longer is a broken stream."""

_HEADER = struct.Struct("!Q")


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


@dataclass(frozen=True, slots=True)
class Taken:
    """The process has read this Submit. A sign that it can be woken, not that its engine gets on."""

    request_id: str


Order = Start | Submit | Cancel | Load | Stop
Word = Hello | Refusal | Report
News = Word | Taken


def pack(message: Order | News) -> bytes:
    """One frame: eight bytes of length, big-endian, then the pickle. Raises WireError above FRAME_CAP."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    if len(body) > FRAME_CAP:
        raise WireError(f"a frame of {len(body)} bytes is over the cap of {FRAME_CAP}")
    return _HEADER.pack(len(body)) + body


def send(sock: socket.socket, message: Order | News) -> None:
    """Blocking send of one frame. Raises OSError when the other side is gone, WireError above FRAME_CAP."""
    sock.sendall(pack(message))


def receive(sock: socket.socket) -> Order | None:
    """Blocking receive of one order; None when the other side is gone. Raises WireError on a broken stream."""
    header = _receive_exactly(sock, _HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(sock, _length(header))
    return None if body is None else cast(Order, _unpack(body))


async def read(reader: asyncio.StreamReader) -> News | None:
    """Next news from a worker; None when it is gone, also in the middle of a frame. Raises WireError."""
    try:
        header = await reader.readexactly(_HEADER.size)
        body = await reader.readexactly(_length(header))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return cast(News, _unpack(body))


def _length(header: bytes | bytearray) -> int:
    length = int(_HEADER.unpack(header)[0])
    if length > FRAME_CAP:
        raise WireError(f"a frame of {length} bytes is over the cap of {FRAME_CAP}")
    return length


def _unpack(body: bytes | bytearray) -> object:
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
