"""Wire: what crosses the process border: messages, and heartbeats on a socket of their own.

A message is a length-framed pickle; both ends are ours, so pickle carries no stranger's bytes.

At each signal of a timer Python's own C handler writes one byte to the second socket, also while a native call (an
import, a large file) holds the interpreter's lock for a minute. A thread that does nothing else writes another byte,
for which it needs that lock. So the front can distinguish three processes: one that is stopped or frozen, one whose
interpreter is held, and one whose main thread alone does not get on: that one is silent for longer than it announced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Literal, cast

from app.cards.card import Card
from app.errors import InstepError
from app.report import Announce, Report
from app.request import Request
from app.settings import Settings

FRAME_CAP = 512 * 1024 * 1024
"""Bytes a frame may have: an 8192 x 8192 image is 201 MB and its latent 67 MB; anything longer is a broken stream."""

_HEADER = struct.Struct("!Q")

BEAT = 0.5
"""Seconds between two heartbeats of a kind."""

START_LIMIT = 120.0
"""Seconds from the start of the process to its Hello; importing torch from a cold disk takes tens.
As many again from there to its first announcement."""

MAX_SILENCE = 900.0
"""Seconds of silence that no announcement can exceed."""

STOPPED = 3.5
"""Seconds without a heartbeat after which the process counts as stopped or frozen."""

HELD = 3.0
"""Seconds after which the interpreter counts as held by one native call. Its main thread cannot speak then, so what it
announced does not count, for START_LIMIT seconds at most."""

LATE = 1.0
"""Seconds between two looks after which it was the front that stood still."""

_FREE = b"\0"
_CHUNK = 4096


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


Method = Literal["submit", "cancel", "load", "unload"]
Call = tuple[Literal["stop"]] | tuple[Method, Request | str]
"""A method of the engine and its argument; Reports answer it."""

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


def beat(descriptor: int) -> None:
    """Write heartbeats to this socket from now on. The main thread calls it before it starts any other."""
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    threading.Thread(target=_beat_on, args=(descriptor,), name="heartbeat", daemon=True).start()
    # That thread takes the signal. All that start from now on inherit the mask, so none of their calls is interrupted.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, BEAT, BEAT)


def _beat_on(descriptor: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            os.write(descriptor, _FREE)
        # NOTE: not signal.pause(): a thread that started earlier, such as numpy's, may take the signal too.
        time.sleep(BEAT)


class Pulse:
    """The front's view of one process: when it last ran, when its interpreter was free, and when it last spoke.

    theirs: the socket for `beat`. phase: what was last announced. Before the first heartbeat only silence counts.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self._limit = START_LIMIT
        self._ran = self._free = 0.0
        self._spoke = self._looked = time.monotonic()
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    def hear(self, message: Word) -> None:
        """Any message is a sign of life of the main thread; an Announce says how long it may be silent now."""
        self._spoke = time.monotonic()
        if isinstance(message, Hello):
            self.phase = "ready"
        elif isinstance(message, Announce):
            self.phase, self._limit = message.phase, message.seconds

    def hang(self) -> str | None:
        """Why this process counts as hung, in words."""
        now = time.monotonic()
        if now - self._looked > LATE:
            # NOTE: what the process sent meanwhile is not read yet.
            self._spoke = now
            self._ran = self._free = now if self._ran else 0.0
        self._looked = now
        if self._ran and (silent := now - self._ran) > STOPPED:
            return f'stopped in phase "{self.phase}", no heartbeat for {silent:.1f} s'
        if self._free and HELD < now - self._free < START_LIMIT:
            self._spoke = now
        if (silent := now - self._spoke) > min(self._limit, MAX_SILENCE):
            return f'hung in phase "{self.phase}", silent for {silent:.1f} s'
        return None

    def close(self) -> None:
        """Close both ends."""
        asyncio.get_running_loop().remove_reader(self._ours)
        self._ours.close()
        self.theirs.close()

    def _read(self) -> None:
        try:
            beats = self._ours.recv(_CHUNK)
        except BlockingIOError:
            return
        if not beats:
            asyncio.get_running_loop().remove_reader(self._ours)
            return
        self._ran = time.monotonic()
        if _FREE in beats:
            self._free = self._ran
