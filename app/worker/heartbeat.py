"""Heartbeat: the engine's process shows that it runs, and that its interpreter is free, whatever its main thread does.

At each signal of a timer Python's own C handler writes one byte to a socket, also while a native call (an import, a
large file) holds the interpreter's lock for a minute. A thread that does nothing else writes another byte, for which it
needs that lock. So the front can distinguish three processes: one that is stopped or frozen, one whose interpreter is
held, and one whose main thread alone does not get on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time

BEAT = 0.5
"""Seconds between two heartbeats of a kind."""

_FREE = b"\0"
_CHUNK = 4096


def start(descriptor: int) -> None:
    """Write heartbeats to this socket from now on. The main thread calls it before it starts any other."""
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    threading.Thread(target=_beat, args=(descriptor,), name="heartbeat", daemon=True).start()
    # That thread takes the signal. All that start from now on inherit the mask, so none of their calls is interrupted.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, BEAT, BEAT)


def _beat(descriptor: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            os.write(descriptor, _FREE)
        # NOTE: not signal.pause(): a thread that started earlier, such as numpy's, may take the signal too.
        time.sleep(BEAT)


class Pulse:
    """The front's end of that socket: how long ago a process ran, and how long ago its interpreter was free.

    Both are 0 until the first heartbeat: before it nothing is known.
    """

    def __init__(self) -> None:
        self._ours: socket.socket | None = None
        self._ran = self._free = 0.0

    def open(self) -> socket.socket:
        """The other end, for the process. Raises OSError: there is no descriptor left."""
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        asyncio.get_running_loop().add_reader(self._ours, self._read, self._ours)
        return theirs

    def silent(self, now: float) -> float:
        """Seconds without any heartbeat."""
        return now - self._ran if self._ran else 0.0

    def held(self, now: float) -> float:
        """Seconds in which nothing in the process could run Python."""
        return now - self._free if self._free else 0.0

    def reset(self, now: float) -> None:
        """Count from now on: it was the front that stood still."""
        if self._ran:
            self._ran = self._free = now

    def close(self) -> None:
        """Read no more."""
        if self._ours:
            asyncio.get_running_loop().remove_reader(self._ours)
            self._ours.close()

    def _read(self, ours: socket.socket) -> None:
        try:
            beats = ours.recv(_CHUNK)
        except BlockingIOError:
            return
        if not beats:
            asyncio.get_running_loop().remove_reader(ours)
            return
        self._ran = time.monotonic()
        if _FREE in beats:
            self._free = self._ran
