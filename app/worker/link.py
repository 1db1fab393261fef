"""Link: one engine process seen from the front: start it, send to it, hear it, notice that it died or hangs, end it.

Knows nothing of requests, queues or restarts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.report import Announce
from app.worker import wire
from app.worker.heartbeat import Pulse

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

_CHECK = 0.1
_EXIT = 2.0
_LINGER = 0.5
_BUFFER = 4 * 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent.parent

log = logging.getLogger("instep.worker")


class Link:
    """One process, from its start to its end. `hear` gets every message; it runs on the event loop.

    `open` until the process is known to be gone; `phase` is what it last announced.
    """

    def __init__(self, command: Sequence[str], hear: Callable[[wire.Word], None]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.phase = "start"
        self.open = True
        self._command = command
        self._hear = hear
        self._transport: asyncio.Transport | None = None
        self._pulse = Pulse()
        self._heard = time.monotonic()
        self._limit = START_LIMIT

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    async def run(self, start: wire.Start) -> str:
        """Start the process and stay with it to its end, which is returned in words. Cancelling kills the process."""
        try:
            ended = await self._spawn()
            self.send(start)
            return await self._watch(ended)
        except OSError as error:
            return f"could not be started: {error}"
        finally:
            self.kill()
            self._pulse.close()
            if self._transport:
                self._transport.abort()

    def send(self, order: wire.Order) -> None:
        """Queue an order; to a process that is gone it goes nowhere, and `run` is about to return."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(wire.pack(order))

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.open = False
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    async def end(self) -> None:
        """Ask it to stop and give it two seconds before SIGKILL; `run` returns soon after."""
        self.send(wire.Stop(drain=False))
        if self.process and not await self._gone(_EXIT):
            log.warning("engine process %d did not stop when asked: killed", self.pid)
            self.kill()

    async def _spawn(self) -> asyncio.Future[None]:
        """The process, with one end of a socket pair. The future is done when its end of it is closed."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # A picture in one piece where the kernel allows it: fewer turns of the event loop.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        loop = asyncio.get_running_loop()
        self._transport, receiver = await loop.create_unix_connection(lambda: wire.Receiver(self._take), sock=ours)
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        with theirs, self._pulse.open() as pulse:
            self.process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), str(pulse.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), pulse.fileno()),
                env={**os.environ, "PYTHONPATH": path},
            )
        self._heard = time.monotonic()
        return receiver.ended

    def _take(self, message: wire.Word) -> None:
        self._heard = time.monotonic()
        if isinstance(message, wire.Hello):
            self.phase = "ready"
        elif isinstance(message, Announce):
            self.phase, self._limit = message.phase, message.seconds
        try:
            self._hear(message)
        except Exception:
            log.exception("a listener failed on %s", type(message).__name__)

    async def _watch(self, ended: asyncio.Future[None]) -> str:
        """Until the stream ends, the process ends (its own children may hold the stream open), or it hangs."""
        checked = time.monotonic()
        while not (await asyncio.wait({ended}, timeout=_CHECK))[0]:
            now = time.monotonic()
            if now - checked > 10 * _CHECK:
                # NOTE: it was we who stood still; what the process said meanwhile is not read yet.
                self._heard = now
                self._pulse.reset(now)
            checked = now
            if self._exit_code() is not None:
                await asyncio.wait({ended}, timeout=_CHECK)
                break
            if hang := self._hang(now):
                self.kill()
                await self._gone(_EXIT)
                return f"{hang}: killed"
        self.open = False
        return await self._last_words(ended)

    def _hang(self, now: float) -> str | None:
        """Why this process counts as hung, in words."""
        if (silent := self._pulse.silent(now)) > STOPPED:
            return f'stopped in phase "{self.phase}", no heartbeat for {silent:.1f} s'
        if HELD < self._pulse.held(now) < START_LIMIT:
            self._heard = now
        if (silent := now - self._heard) > min(self._limit, MAX_SILENCE):
            return f'hung in phase "{self.phase}", silent for {silent:.1f} s'
        return None

    async def _last_words(self, ended: asyncio.Future[None]) -> str:
        broken = ended.exception() if ended.done() else None
        if broken:
            self.kill()
        # A process that closed its end but lingers is of no more use.
        if not await self._gone(_LINGER):
            self.kill()
            await self._gone(_EXIT)
        if broken:
            return f"sent what cannot be read ({broken}): killed"
        code = self._exit_code()
        if code is not None and code < 0:
            return f"died of signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"

    async def _gone(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._exit_code() is None and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return self._exit_code() is not None

    def _exit_code(self) -> int | None:
        return self.process.poll() if self.process else None
