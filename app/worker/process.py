"""Process: the engine in a process of its own, `python -m app.worker.process FD PULSE PAGE`, or on a thread here.

FD is the one connection to the front, and the end of that is the end of the process. PULSE is the socket of its
heartbeats, and PAGE a file in memory that says what it computes. It has four threads: a heartbeat, a reader (orders
in), a sender (reports out), and the main thread, which is `engine.run()`.
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
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from app import logs
from app.errors import EngineError, InstepError, SettingsError
from app.report import Failure, Preview, Progress, Report, Result, Tick
from app.settings import Settings
from app.worker import plan, wire

if TYPE_CHECKING:
    import torch

    from app.cards.card import Card
    from app.engine.engine import Engine
    from app.jobs.job import Job
    from app.pool.pool import Pool

HOLD = 0.25
"""Seconds that a Tick may wait for others while the engine works on."""

KERNELS = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "256")
"""Kernels that oneDNN keeps on a CPU. It makes some for each width of a forward, of half a megabyte, and keeps 1024."""

log = logging.getLogger("instep.worker")


class Sender:
    """Sends words from a thread of its own, so that the engine never waits for the front.

    Ticks are kept back, because each message on its own wakes the front, which shares the cores with a forward. Any
    other word takes them along at once, and so does a Tick when HOLD seconds have passed since the last were sent:
    pictures, previews and steps are never late, and the Ticks arrive one by one, in order.
    """

    def __init__(self, send: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._outbox: SimpleQueue[list[wire.Word]] = SimpleQueue()
        self._kept: list[wire.Word] = []
        self._last = -HOLD
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def emit(self, word: wire.Word) -> None:
        """Queue one word for the front; never blocks. For the main thread alone."""
        self._kept.append(word)
        now = self._clock()
        if not isinstance(word, Tick) or now >= self._last + HOLD:
            self._last = now
            self._flush()

    def finish(self) -> None:
        """Wait until every word is sent."""
        self._flush()
        self._outbox.put([])
        self._thread.join(timeout=5.0)

    def _flush(self) -> None:
        if self._kept:
            self._outbox.put(self._kept)
            self._kept = []

    def _run(self) -> None:
        try:
            while words := self._outbox.get():
                self._send(*words)
        except OSError:
            os._exit(0)
        except Exception:
            log.exception("the sender failed")
            os._exit(1)


def obey(stream: BufferedIOBase, engine: Future[Engine]) -> None:
    """Call the engine's methods as the front orders, to the end of the stream, which ends the process."""
    try:
        while (order := wire.receive(stream)) is not None:
            method, *arguments = order
            if method == "stop" and not engine.done():
                break
            getattr(engine.result(), method)(*arguments)
    except Exception:
        log.exception("the reader failed")
        os._exit(1)
    # The front is gone. The main thread may be deep in a forward: it is not asked.
    os._exit(0)


def serve(descriptor: int, pulse: int, page: int) -> int:
    """Serve the front at the other end of this socket until it says stop or is gone. Returns the exit code.

    pulse: the socket of the heartbeats. page: the memory of a `Page`.
    """
    wire.beat(pulse)
    # NOTE: Ctrl-C reaches the whole terminal group, systemd's SIGTERM the control group: the front decides what to
    # do about them, and drains. Its word, or its end, ends us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    stream = socket.socket(fileno=descriptor).makefile("rwb")
    start = wire.receive(stream)
    if start is None:
        return 0
    _, settings, cards, device = start
    logs.setup(settings.log_level)
    reached: Future[Engine] = Future()
    threading.Thread(target=obey, args=(stream, reached), name="reader", daemon=True).start()
    sender = Sender(partial(wire.send, stream))
    try:
        pool, engine = build(settings, cards, device, sender.emit, wire.Page(page))
    except InstepError as error:
        sender.emit(wire.Hello(error))
        sender.finish()
        return 1
    sender.emit(wire.Hello())
    reached.set_result(engine)
    for model in plan.preloads(settings, cards):
        pool.want(model)
    engine.run()
    pool.close()
    sender.finish()
    return 0


def build(
    settings: Settings,
    cards: dict[str, Card],
    device: str,
    emit: Callable[[Report], None],
    page: wire.Page | None = None,
) -> tuple[Pool, Engine]:
    """Pool and engine on the device, for the calling thread. Raises SettingsError when there is no such device."""
    page = page or wire.Page()
    os.environ.update(KERNELS | os.environ)
    import torch

    from app.engine.engine import Engine
    from app.families.compiling import allow_compiling
    from app.pool.budget import budgets, use_threads
    from app.pool.pool import Pool

    if device != "cpu":
        _use_gpu(device)
    use_threads(plan.threads(settings))
    budget, host = budgets(settings, device, plan.devices(settings.devices))
    dtype = resolve_dtype(settings, device)
    # Else a GPU's convolutions round float32 to ten bits, in some widths of a batch and not in others.
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    if settings.compile:
        allow_compiling(settings.cache)
    pool = Pool(cards, device, dtype, budget=budget, host=host, compiled=settings.compile, loads=page.loads)
    return pool, Engine(pool, settings, emit, computes=page.computes)


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


def _use_gpu(device: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise SettingsError(f"INSTEP_DEVICES: {device}: torch sees no GPU here; use cpu", param="devices")
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise SettingsError(f"INSTEP_DEVICES: {device}: there are {torch.cuda.device_count()} GPUs", param="devices")
    torch.cuda.set_device(index)


class Local:
    """Takes jobs as a Supervisor does, for an engine on a thread of this process: for commands that need no server.

    The engine has the first of the devices that the settings name. `observe` and the jobs get its reports on its
    thread, in order, and may submit further jobs. At the end of the context what is in flight is cancelled.
    """

    def __init__(
        self, settings: Settings, cards: dict[str, Card], *, observe: Callable[[Report], None] = lambda report: None
    ) -> None:
        self._observe, self._cores = observe, plan.threads(settings)
        self._jobs: dict[str, Job] = {}
        self._pool, self._engine = build(settings, cards, plan.devices(settings.devices)[0], self._hear)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._crash: EngineError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in list(self._jobs.values()):
            job.cancel()
        self._engine.stop()
        self._thread.join(timeout=60)
        self._pool.close()

    def submit(self, job: Job) -> Job:
        """Give the job to the engine and return it. It fails when the engine dies."""
        self._jobs[job.request.id] = job
        job.future.add_done_callback(partial(self._close, job.request.id))
        self._engine.submit(job.request)
        if self._crash:
            job.fail(self._crash)
        return job

    def _close(self, request_id: str, future: Future[list[Result]]) -> None:
        self._jobs.pop(request_id, None)
        if future.cancelled():
            self._engine.cancel(request_id)

    def _hear(self, report: Report) -> None:
        self._observe(report)
        if isinstance(report, Result | Progress | Preview | Failure) and (job := self._jobs.get(report.request_id)):
            job.hear(report)

    def _run(self) -> None:
        from app.pool.budget import use_threads

        use_threads(self._cores)
        try:
            self._engine.run()
        except Exception as error:
            self._crash = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            for job in list(self._jobs.values()):
                job.fail(self._crash)


def main() -> None:
    """Serve the front on the descriptors of the command line, then exit."""
    code = 1
    try:
        code = serve(*map(int, sys.argv[1:4]))
    except Exception:
        log.exception("the engine process ends")
    # Threads that load, and torch's own teardown, would hold up the exit for seconds.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
