"""Wire: what crosses the process border: messages, heartbeats on a socket of their own, and a page that outlives it.

A message is a length-framed pickle; both ends are ours, so pickle carries no stranger's bytes.

At each signal of a timer Python's own C handler writes one byte to the second socket, also while a native call (an
import, a large file) holds the interpreter's lock for a minute. A thread that does nothing else writes another byte,
for which it needs that lock. So the front can distinguish three processes: one that is stopped or frozen, one whose
interpreter is held, and one whose main thread alone does not get on: that one is silent for longer than it announced.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import pickle
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, cast

from app.errors import InstepError
from app.report import Announce, Place, Report

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
_HALF = 128 * 1024
_CHUNK = 4096

Order = tuple[str, *tuple[Any, ...]]
"""A method of the engine and its arguments; Reports answer it. The first is "start": settings, cards by id, device."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of a worker: its device, pool and engine are there, or the error with which it ends."""

    error: InstepError | None = None


Word = Hello | Report


def pack(message: Order | Word) -> bytes:
    """One frame: eight bytes of length, big-endian, then the pickle. Raises ValueError above FRAME_CAP."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(_checked(len(body))) + body


def send(stream: BufferedIOBase, *messages: Order | Word) -> None:
    """Blocking send of one frame each, in one piece.

    Raises OSError when the other side is gone, ValueError above FRAME_CAP.
    """
    stream.write(b"".join(map(pack, messages)))
    stream.flush()


def receive(stream: BufferedIOBase) -> Any:
    """Blocking receive of one message; None when the other side is gone. Raises ValueError on a broken stream."""
    try:
        header = stream.read(_HEADER.size)
        length = _length(header) if len(header) == _HEADER.size else 0
        body = stream.read(length)
    except ConnectionError:
        return None
    return _unpack(body) if length and len(body) == length else None


async def read(stream: asyncio.StreamReader) -> Word | None:
    """The next message; None when the other side is gone. Raises ValueError on a broken stream."""
    try:
        body = await stream.readexactly(_length(await stream.readexactly(_HEADER.size)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return cast(Word, _unpack(body))


def _length(header: bytes) -> int:
    return _checked(int(_HEADER.unpack(header)[0]))


def _checked(length: int) -> int:
    if length > FRAME_CAP:
        raise ValueError(f"a frame of {length} bytes is over the cap of {FRAME_CAP}")
    return length


def _unpack(body: bytes) -> object:
    try:
        return pickle.loads(body)
    except Exception as error:
        raise ValueError(f"a frame of {len(body)} bytes is not a message: {error}") from error


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

    def hear(self, message: Word) -> None:
        """Any message is a sign of life of the main thread; an Announce says how long it may be silent now."""
        self._spoke = time.monotonic()
        if isinstance(message, Hello):
            self.phase = "ready"
        elif isinstance(message, Announce):
            self.phase, self._limit = message.phase, message.seconds

    def hang(self) -> str | None:
        """Why this process counts as hung, in words. Call it more often than every LATE seconds."""
        now = time.monotonic()
        self._read(now)
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
        self._ours.close()
        self.theirs.close()

    def _read(self, now: float) -> None:
        """Note the heartbeats that have come since the last look; they wait in the socket, a few a second."""
        with contextlib.suppress(BlockingIOError):
            beats = self._ours.recv(_CHUNK)
            if beats:
                self._ran = now
            if _FREE in beats:
                self._free = now


class Page:
    """Memory that an engine process writes, and that the front can read after the death of that process.

    One half is of the thread that computes, the other of the thread that loads. A half that was being written counts
    as empty. descriptor: of the same memory in another process, or None for new memory.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("instep-page") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, 2 * _HALF)
        self._memory = mmap.mmap(self.descriptor, 2 * _HALF)

    def computes(self, places: Sequence[Place], measured: str = "") -> None:
        """Write which rows the next work computes, or the "MODEL WxH" that it measures; neither while it has none."""
        self._write(0, (places, measured))

    def loads(self, model: str) -> None:
        """Write which model is being loaded, "" for none."""
        self._write(_HALF, ([], model))

    def read(self) -> tuple[list[Place], set[str]]:
        """The rows that were computed last, the "MODEL WxH" that was measured, and the model that was loaded."""
        halves = [self._read(start) for start in (0, _HALF)]
        return halves[0][0], {model for _, model in halves if model}

    def close(self) -> None:
        """Free this process's view of it."""
        self._memory.close()
        os.close(self.descriptor)

    def _write(self, start: int, facts: tuple[Sequence[Place], str]) -> None:
        data = pickle.dumps(facts)
        body = start + _HEADER.size
        self._memory[start:body] = bytes(_HEADER.size)
        if len(data) <= _HALF - _HEADER.size:
            self._memory[body : body + len(data)] = data
            self._memory[start:body] = _HEADER.pack(len(data))

    def _read(self, start: int) -> tuple[list[Place], str]:
        body = start + _HEADER.size
        (length,) = _HEADER.unpack(self._memory[start:body])
        return pickle.loads(self._memory[body : body + length]) if length else ([], "")
