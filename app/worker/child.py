"""Child: the engine process of one device, seen from the front: started, sent to, heard, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from app.errors import InstepError, Unavailable
from app.report import Place, Report
from app.worker import wire
from app.worker.admission import Backlog

FIRST_DELAY = 0.5
"""Seconds before the first restart; doubles to LAST_DELAY, and starts over after HEALTHY seconds of life."""
LAST_DELAY = 30.0
HEALTHY = 60.0

PATIENCE = 2.0
"""Seconds that a process may take to end when it was asked to, or killed."""

_CHECK = 0.1
_LINGER = 0.5
_BUFFER = 4 * 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent.parent

log = logging.getLogger("instep.worker")


class Child:
    """One entry of DEVICES: its process, and the backlog of jobs that it has.

    start: makes the first order to each process. `hear(report, name)` gets the reports; `greet()` is called for each
    process that is ready, `bury(child, reason)` for each that is gone. proved: whether the process that lives, or
    the last that ended, was ready. computed: as `Page.read`, of the process that died last.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        start: Callable[[], wire.Order],
        hear: Callable[[Report, str], None],
        greet: Callable[[], None],
        bury: Callable[[Child, str], None],
    ) -> None:
        self.name = name
        self.backlog = Backlog()
        self.restarts = 0
        self.proved = self._greets = False
        self.computed: tuple[list[Place], set[str]] = [], set()
        self._command, self._start = command, start
        self._hear, self._greet, self._bury = hear, greet, bury
        self._state: Literal["start", "live", "gone"] = "gone"
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._greeted: asyncio.Future[None] | None = None
        self._refusal: InstepError | None = None
        self._born = self._back_at = 0.0
        self._startup = 5.0
        self._stopping = False

    @property
    def live(self) -> bool:
        """Whether the process has said Hello and is not known to be gone."""
        return self._state == "live"

    @property
    def pid(self) -> int:
        """The process's id; 0 while there is none."""
        return self._process.pid if self._process else 0

    @property
    def back_in(self) -> float:
        """Seconds until a process is expected to be ready; 0 while one is."""
        return 0.0 if self.live else max(0.0, self._back_at - time.monotonic())

    def call(self, method: str, *arguments: object) -> None:
        """Call a method of the engine in the process, which does so once it is ready; without one it goes nowhere."""
        if self._state != "gone":
            self._write((method, *arguments))

    async def start(self) -> None:
        """Start the process and wait for its Hello. Raises its refusal, or Unavailable when it ended before that."""
        self._greeted = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(self._greeted))
        await self._greeted

    async def stop(self, *, ask: bool = True) -> None:
        """End the process for good: ask it to stop, and kill it where that is not wanted or takes over PATIENCE."""
        self._stopping = True
        if not self._task or not self._greeted:
            return
        if ask and (process := self._process):
            self._write(("stop",))
            if not (await asyncio.wait({self._task}, timeout=PATIENCE))[0]:
                log.warning("engine process %d did not stop when asked: killed", process.pid)
        if self._process:
            self._kill(self._process)
            await asyncio.wait({self._task}, timeout=PATIENCE)
        self._task.cancel()
        await asyncio.wait({self._task})
        self._greeted.cancel()

    async def _keep(self, greeted: asyncio.Future[None]) -> None:
        """Live, die, wait, live again; ends when stopped, or when the very first process never says Hello."""
        delay = FIRST_DELAY
        while not self._stopping:
            self._born, self._greets, self.computed = time.monotonic(), False, ([], set())
            try:
                reason = await self._live()
            except OSError as error:
                reason = f"could not be started: {error}"
            except Exception as error:
                # NOTE: a bug of ours, or a limit of this machine. Without this the device would never be tried again.
                log.exception("the watch over the engine process on %s broke", self.name)
                reason = f"lost its watch ({type(error).__name__}): killed"
            finally:
                self._state, self._process = "gone", None
            self.proved = self._greets
            if time.monotonic() - self._born > HEALTHY:
                delay = FIRST_DELAY
            self._back_at = time.monotonic() + delay + self._startup
            self._bury(self, reason)
            if self._stopping:
                return
            log.error("engine process on %s %s; next try in %.1f s", self.name, reason, delay)
            if not greeted.done():
                words = f"The engine process on {self.name} {reason} before it was ready."
                greeted.set_exception(self._refusal or Unavailable(words, code="no_worker"))
                return
            await asyncio.sleep(delay)
            delay = min(LAST_DELAY, 2 * delay)
            self.restarts += 1

    async def _live(self) -> str:
        """Start a process and stay with it to its end, which is returned in words. Cancelling kills it."""
        with contextlib.ExitStack() as exits:
            pulse = exits.enter_context(contextlib.closing(wire.Pulse()))
            page = exits.enter_context(contextlib.closing(wire.Page()))
            ours, theirs = socket.socketpair()
            with theirs, pulse.theirs:
                # A picture in one piece where the kernel allows it: fewer turns of the event loop.
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=_BUFFER)
                exits.callback(self._writer.transport.abort)
                process = self._process = await self._spawn(theirs.fileno(), pulse.theirs.fileno(), page.descriptor)
            exits.callback(self._kill, process)
            listening = asyncio.create_task(self._listen(reader, pulse))
            ended = asyncio.create_task(process.wait())
            exits.callback(listening.cancel)
            exits.callback(ended.cancel)
            self._write(self._start())
            self._state = "start"
            try:
                return await self._watch(process, listening, ended, pulse)
            finally:
                self.computed = page.read()

    async def _spawn(self, *descriptors: int) -> Process:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        words = [*self._command, *map(str, descriptors)]
        environment = {**os.environ, "PYTHONPATH": path}
        return await asyncio.create_subprocess_exec(*words, stdin=DEVNULL, pass_fds=descriptors, env=environment)

    def _write(self, order: wire.Order) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack(order))

    def _kill(self, process: Process) -> None:
        """SIGKILL, if it still runs."""
        self._state = "gone"
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    async def _listen(self, reader: asyncio.StreamReader, pulse: wire.Pulse) -> None:
        """Hear the process until its end of the stream is closed. Raises ValueError when the stream is broken."""
        while (message := await wire.read(reader)) is not None:
            pulse.hear(message)
            try:
                self._receive(message)
            except Exception:
                log.exception("a listener failed on %s", type(message).__name__)

    def _receive(self, message: wire.Word) -> None:
        if not isinstance(message, wire.Hello):
            self.backlog.hear(message)
            self._hear(message, self.name)
        elif message.error:
            self._refusal = message.error
            log.error("engine process on %s refuses: %s", self.name, message.error.message)
        elif self._state == "start":  # else it comes too late
            self._state, self.proved, self._greets = "live", True, True
            self._startup = time.monotonic() - self._born
            log.info("engine process %d on %s ready in %.1f s", self.pid, self.name, self._startup)
            if self._greeted and not self._greeted.done():
                self._greeted.set_result(None)
            self._greet()

    async def _watch(
        self, process: Process, listening: asyncio.Task[None], ended: asyncio.Task[int], pulse: wire.Pulse
    ) -> str:
        """Until the stream ends, the process ends (its own children may hold the stream open), or it hangs."""
        both, hang = {listening, ended}, None
        while not hang and not (await asyncio.wait(both, timeout=_CHECK, return_when="FIRST_COMPLETED"))[0]:
            hang = pulse.hang()
        self._state = "gone"
        # The stream may still have the last words of a process that ended; one that closed its end is of no more use.
        if not hang:
            await asyncio.wait(both, timeout=_LINGER)
        broken = listening.exception() if listening.done() else None
        if not ended.done():
            self._kill(process)
            await asyncio.wait({ended}, timeout=PATIENCE)
        if hang or broken:
            return f"{hang or f'sent what cannot be read ({broken})'}: killed"
        code = process.returncode
        if code is not None and code < 0:
            return f"died of signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"
