"""Wire: the messages that cross the process border, and how they cross: length-framed pickles over a socketpair.

Both ends are ours, so pickle carries no stranger's bytes.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Literal, cast

from app.cards.card import Card
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
    """First order to a worker: everything that it needs to build its pool and engine."""

    settings: Settings
    cards: dict[str, Card]
    device: str


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of a worker whose device, pool and engine are there; models may not be."""

    pid: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Only word of a worker that cannot work with its Start; it ends after this."""

    error: InstepError


Method = Literal["submit", "cancel", "load", "unload", "stop"]
Call = tuple[Method, Request | str | bool]
"""A method of the engine and its one argument; Reports answer it."""

Order = Start | Call
Word = Hello | Refusal | Report


def pack(message: Order | Word) -> bytes:
    """One frame: eight bytes of length, big-endian, then the pickle. Raises WireError above FRAME_CAP."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(_checked(len(body))) + body


def send(sock: socket.socket, *messages: Order | Word) -> None:
    """Blocking send of one frame each, in one piece.

    Raises OSError when the other side is gone, WireError above FRAME_CAP.
    """
    sock.sendall(b"".join(map(pack, messages)))


def receive(sock: socket.socket) -> Order | None:
    """Blocking receive of one order; None when the other side is gone. Raises WireError on a broken stream."""
    header = _receive_exactly(sock, _HEADER.size)
    body = header and _receive_exactly(sock, _length(header))
    return None if body is None else cast(Order, _unpack(body))


async def read(stream: asyncio.StreamReader) -> Word | None:
    """The next message; None when the other side is gone. Raises WireError on a broken stream."""
    try:
        body = await stream.readexactly(_length(await stream.readexactly(_HEADER.size)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return cast(Word, _unpack(body))


def _length(header: bytes | bytearray) -> int:
    return _checked(int(_HEADER.unpack(header)[0]))


def _checked(length: int) -> int:
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
