"""Child: the engine process of one device, seen from the front: started, sent to, heard, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Literal

from app.errors import InstepError, Unavailable
from app.jobs.job import Job
from app.report import Memory, Report, Result
from app.request import Request
from app.worker import wire
from app.worker.admission import Backlog

FIRST_DELAY = 0.5
"""Seconds before the first restart; doubles to LAST_DELAY, and starts over after HEALTHY seconds of life."""
LAST_DELAY = 30.0
HEALTHY = 60.0

_CHECK = 0.1
_EXIT = 2.0
_LINGER = 0.5
_BUFFER = 4 * 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent.parent

log = logging.getLogger("instep.worker")


class Child:
    """One entry of DEVICES: its process, and the backlog of jobs that it has.

    `hear(child, report)` gets the reports, `bury(child, reason)` each death. back_in: seconds from a death until the
    next process is expected to be ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        start: wire.Start,
        hear: Callable[[Child, Report], None],
        bury: Callable[[Child, str], None],
    ) -> None:
        self.name = name
        self.backlog = Backlog()
        self.memory = Memory(name, {})
        self.restarts = 0
        self.back_in = 5.0
        self._command = command
        self._start = start
        self._hear = hear
        self._bury = bury
        self._state: Literal["start", "live", "gone"] = "gone"
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._greeted: asyncio.Future[None] | None = None
        self._refusal: InstepError | None = None
        self._born = 0.0
        self._startup = 5.0
        self._delay = FIRST_DELAY
        self._stopping = False

    @property
    def live(self) -> bool:
        """Whether the process has said Hello and is not known to be gone."""
        return self._state == "live"

    @property
    def pid(self) -> int:
        """The process's id; 0 while there is none."""
        return self._process.pid if self._process else 0

    def call(self, method: wire.Method, argument: Request | str) -> None:
        """Call a method of the engine in the live process; without one it goes nowhere."""
        if self.live:
            self._write((method, argument))

    def take(self, job: Job) -> None:
        """Hand the job to the engine. It leaves the backlog when it ends, whoever ended it."""
        self.backlog.add(job)
        job.future.add_done_callback(partial(self._drop, job.request.id))
        self.call("submit", job.request)

    def _drop(self, request_id: str, future: Future[list[Result]]) -> None:
        self.backlog.end(self.backlog.jobs[request_id])
        if future.cancelled():
            self.call("cancel", request_id)

    async def start(self) -> None:
        """Start the process and wait for its Hello. Raises its refusal, or NoWorker when it ended before that."""
        self._greeted = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(self._greeted))
        await self._greeted

    async def stop(self) -> None:
        """End the process for good: ask it to stop, and kill it after two seconds."""
        self._stopping = True
        if not self._task or not self._greeted:
            return
        if process := self._process:
            self._write(("stop",))
            if not await _gone(process, _EXIT):
                log.warning("engine process %d did not stop when asked: killed", process.pid)
                self._kill(process)
            await asyncio.wait({self._task}, timeout=1.0)
        self._task.cancel()
        await asyncio.wait({self._task})
        self._greeted.cancel()

    async def _keep(self, greeted: asyncio.Future[None]) -> None:
        """Live, die, wait, live again; ends when stopped, or when the very first process never says Hello."""
        while not self._stopping:
            self._born, self._state = time.monotonic(), "start"
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
            if time.monotonic() - self._born > HEALTHY:
                self._delay = FIRST_DELAY
            self.back_in = self._delay + self._startup
            self._bury(self, reason)
            if self._stopping:
                return
            log.error("engine process on %s %s; next try in %.1f s", self.name, reason, self._delay)
            if not greeted.done():
                words = f"The engine process on {self.name} {reason} before it was ready."
                greeted.set_exception(self._refusal or Unavailable(words, code="no_worker"))
                return
            await asyncio.sleep(self._delay)
            self._delay = min(LAST_DELAY, 2 * self._delay)
            self.restarts += 1

    async def _live(self) -> str:
        """Start a process and stay with it to its end, which is returned in words. Cancelling kills it."""
        with contextlib.ExitStack() as exits:
            pulse = exits.enter_context(contextlib.closing(wire.Pulse()))
            ours, theirs = socket.socketpair()
            with theirs, pulse.theirs:
                # A picture in one piece where the kernel allows it: fewer turns of the event loop.
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=_BUFFER)
                exits.callback(self._writer.transport.abort)
                process = self._process = self._spawn(theirs.fileno(), pulse.theirs.fileno())
            exits.callback(self._kill, process)
            listening = asyncio.create_task(self._listen(reader, pulse))
            exits.callback(listening.cancel)
            self._write(self._start)
            return await self._watch(process, listening, pulse)

    def _spawn(self, *descriptors: int) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [*self._command, *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": path},
        )

    def _write(self, order: wire.Order) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack(order))

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL, if it still runs."""
        self._state = "gone"
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)

    async def _listen(self, reader: asyncio.StreamReader, pulse: wire.Pulse) -> None:
        """Hear the process until its end of the stream is closed. Raises WireError when the stream is broken."""
        while (message := await wire.read(reader)) is not None:
            pulse.hear(message)
            try:
                self._receive(message)
            except Exception:
                log.exception("a listener failed on %s", type(message).__name__)

    def _receive(self, message: wire.Word) -> None:
        match message:
            case wire.Hello(pid):
                self._startup = time.monotonic() - self._born
                if self._state == "start":
                    self._state = "live"
                if self._greeted and not self._greeted.done():
                    self._greeted.set_result(None)
                log.info("engine process %d on %s ready in %.1f s", pid, self.name, self._startup)
            case wire.Refusal(error):
                self._refusal = error
                log.error("engine process on %s refuses: %s", self.name, error.message)
            case _:
                self.backlog.hear(message)
                self._hear(self, message)

    async def _watch(self, process: subprocess.Popen[bytes], listening: asyncio.Task[None], pulse: wire.Pulse) -> str:
        """Until the stream ends, the process ends (its own children may hold the stream open), or it hangs."""
        while not (await asyncio.wait({listening}, timeout=_CHECK))[0]:
            if process.poll() is not None:
                await asyncio.wait({listening}, timeout=_CHECK)
                break
            if hang := pulse.hang():
                self._kill(process)
                await _gone(process, _EXIT)
                return f"{hang}: killed"
        self._state = "gone"
        broken = listening.exception() if listening.done() else None
        # A process that closed its end but lingers is of no more use.
        if broken or not await _gone(process, _LINGER):
            self._kill(process)
            await _gone(process, _EXIT)
        if broken:
            return f"sent what cannot be read ({broken}): killed"
        code = process.poll()
        if code is not None and code < 0:
            return f"died of signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"


async def _gone(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process has ended within so many seconds."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        await asyncio.sleep(0.01)
    return process.poll() is not None
