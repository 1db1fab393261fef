"""Process: the engine's own process, `python -m app.worker.process FD PULSE`: reads Start, says Hello, runs the engine.

FD is its one connection, and the end of that is its own end. PULSE is the socket of its heartbeats.

Four threads: a heartbeat, a reader (orders in), a sender (reports out), and the main thread, which is `engine.run()`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from app import logs
from app.errors import InstepError, SettingsError
from app.report import Report, Tick
from app.settings import Settings
from app.worker import plan, wire

if TYPE_CHECKING:
    import torch

    from app.engine.engine import Engine
    from app.pool.pool import Pool

HOLD = 0.25
"""Seconds that a Tick may wait for others while the engine works on."""

log = logging.getLogger("instep.worker")


class Bundle:
    """Keeps Ticks back, because each message on its own wakes the front, which shares the cores with a forward.

    Any other word takes them along at once, and so does a Tick when HOLD seconds have passed since the last were sent:
    pictures, previews and steps are never late, and the Ticks arrive one by one, in order.
    """

    def __init__(self) -> None:
        self._held: list[wire.Word] = []
        self._last = -HOLD

    def add(self, word: wire.Word, now: float) -> list[wire.Word]:
        """What is to be sent now, at `now` seconds: nothing, or the word and all before it."""
        self._held.append(word)
        if isinstance(word, Tick) and now < self._last + HOLD:
            return []
        self._last = now
        return self.rest()

    def rest(self) -> list[wire.Word]:
        """All that was kept back."""
        held, self._held = self._held, []
        return held


class Ends:
    """The reader and the sender of this process. engine: whose methods the orders call, once it is there."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox: SimpleQueue[list[wire.Word] | None] = SimpleQueue()
        self._bundle = Bundle()
        self.engine: Future[Engine] = Future()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()

    def emit(self, word: wire.Word) -> None:
        """Queue one message for the front; never blocks. For the main thread alone."""
        if words := self._bundle.add(word, time.monotonic()):
            self._outbox.put(words)

    def finish(self) -> None:
        """Wait until everything queued is sent."""
        self._outbox.put(self._bundle.rest())
        self._outbox.put(None)
        self._sender.join(timeout=5.0)

    def _read(self) -> None:
        try:
            while (order := wire.receive(self._sock)) is not None:
                self._obey(order)
        except Exception:
            log.exception("the reader failed")
            os._exit(1)
        # The front is gone. The main thread may be deep in a forward: it is not asked.
        os._exit(0)

    def _obey(self, order: wire.Order) -> None:
        assert isinstance(order, tuple), "Start comes once"
        method, *arguments = order
        if method == "stop" and not self.engine.done():
            os._exit(0)
        getattr(self.engine.result(), method)(*arguments)

    def _send(self) -> None:
        try:
            while (words := self._outbox.get()) is not None:
                wire.send(self._sock, *words)
        except OSError:
            os._exit(0)
        except Exception:
            log.exception("the sender failed")
            os._exit(1)


def main(descriptor: int, pulse: int) -> int:
    """Serve the front at the other end of this socket until it says Stop or is gone. Returns the exit code.

    pulse: the socket of the heartbeats.
    """
    wire.beat(pulse)
    # NOTE: Ctrl-C reaches the whole terminal group, systemd's SIGTERM the control group: the front decides what to
    # do about them, and drains. Its word, or its end, ends us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    start = wire.receive(sock)
    if not isinstance(start, wire.Start):
        return 0
    logs.setup(start.settings.log_level)
    ends = Ends(sock)
    try:
        pool, engine = build(start, ends.emit)
    except InstepError as error:
        ends.emit(wire.Refusal(error))
        ends.finish()
        return 1
    ends.emit(wire.Hello(os.getpid()))
    ends.engine.set_result(engine)
    for model in plan.preloads(start.settings, start.cards):
        pool.want(model)
    engine.run()
    pool.close()
    ends.finish()
    return 0


def build(start: wire.Start, emit: Callable[[Report], None]) -> tuple[Pool, Engine]:
    """Pool and engine on the device, for the calling thread. Raises SettingsError when there is no such device."""
    import torch

    from app.engine.engine import Engine
    from app.families.compiling import allow_compiling
    from app.pool.budget import budgets, use_threads
    from app.pool.pool import Pool

    use_threads(plan.threads(start.settings))
    _check(start.device)
    budget, host = budgets(start.settings, start.device, plan.devices(start.settings.devices))
    dtype = resolve_dtype(start.settings, start.device)
    # Else a GPU's convolutions round float32 to ten bits, in some widths of a batch and not in others.
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    if start.settings.compile:
        allow_compiling(start.settings.cache)
    pool = Pool(start.cards, start.device, dtype, budget=budget, host=host, compiled=start.settings.compile)
    return pool, Engine(pool, start.settings, emit)


def resolve_dtype(settings: Settings, device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """The number format of the networks: as set, or for "auto" bfloat16 where the hardware computes in it.

    On a processor without AVX512_BF16 or AMX bfloat16 is emulated, several times slower than float32.
    """
    import torch

    if settings.dtype != "auto":
        return torch.float32 if settings.dtype == "float32" else torch.bfloat16
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = cpuinfo.read_text(errors="replace").split() if cpuinfo.exists() else []
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


def _check(device: str) -> None:
    import torch

    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise SettingsError(f"INSTEP_DEVICES: {device}: torch sees no GPU here; use cpu", param="devices")
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise SettingsError(f"INSTEP_DEVICES: {device}: there are {torch.cuda.device_count()} GPUs", param="devices")
    torch.cuda.set_device(index)


def _run() -> None:
    code = 1
    try:
        code = main(int(sys.argv[1]), int(sys.argv[2]))
    except Exception:
        log.exception("the engine process ends")
    # Threads that load, and torch's own teardown, would hold up the exit for seconds.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    _run()
