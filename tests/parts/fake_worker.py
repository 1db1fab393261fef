"""A worker without torch: the same messages as `app.worker.process`, for the tests of the front.

Every image is one solid colour, `colour(condition, seed)`.

Rows advance together, one step a tick of STEP seconds, as the engine's do. Prompts that begin with "!" misbehave:
    !nan        the request fails with non_finite_output at its second step; !nan 6 at its sixth, if it has one
    !oom        the request fails with OutOfMemory at its second step
    !load       the request fails with CheckpointError before its first step
    !hang       announces 0.3 seconds, then says nothing for ever
    !held 8     announces 4 seconds, then holds the interpreter for 8 in a native call, and goes on
    !die        the process kills itself with SIGKILL at the second step
    !slow 2.5   the request takes about 2.5 seconds, spread over its steps; others go on meanwhile
Rows that are computed are on the page, and those that are suspect are computed alone, as the engine does.
Run as `python tests/parts/fake_worker.py FD PULSE PAGE`. INSTEP_FAKE_LOAD: seconds a model takes to load (default 0).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from app.cards.card import Card
from app.errors import Cancelled, CheckpointError, EngineError, InstepError, ModelNotFound, OutOfMemory
from app.report import Announce, Failure, ModelState, Preview, Progress, Report, Result, Tick, Timings
from app.request import Condition, ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker import wire

STEP = 0.002
RATE = 0.0002
"""Seconds a pass, as told: every body that the cards allow costs less than the shortest deadline there is."""
CAP = 16
IDLE = 30.0


def words(condition: Condition) -> str:
    return condition.text if isinstance(condition, Prompt) else f"label {condition.index}"


def colour(condition: Condition, seed: int) -> tuple[int, int, int]:
    """The colour of the image that this worker paints: a function of prompt (or label) and seed only."""
    digest = hashlib.sha256(f"{words(condition)}|{seed}".encode()).digest()
    return digest[0], digest[1], digest[2]


@dataclass
class Row:
    request: Request
    index: int
    born: float = field(default_factory=time.monotonic)
    started: float = 0.0
    step: int = 0
    apart: int = -2

    @property
    def spec(self) -> ImageSpec:
        return self.request.images[self.index]

    @property
    def due(self) -> bool:
        """Whether a step may be taken now: a "!slow S" row takes its first step at once, its last after S seconds."""
        text = words(self.spec.condition)
        if not text.startswith("!slow"):
            return True
        share = self.step / (self.request.recipe.steps - 1) if self.request.recipe.steps > 1 else 1.0
        return time.monotonic() >= self.started + float(text.split()[1]) * share

    def picture(self) -> np.ndarray:
        pixels = np.empty((self.request.recipe.height, self.request.recipe.width, 3), np.uint8)
        pixels[:] = colour(self.spec.condition, self.spec.seed)
        return pixels


class FakeWorker:
    def __init__(self, stream: BinaryIO, page: wire.Page, settings: Settings, cards: dict[str, Card]) -> None:
        self.stream, self.page = stream, page
        self.sending = threading.Lock()
        self.cards = cards
        self.orders: queue.SimpleQueue[wire.Order] = queue.SimpleQueue()
        self.rows: list[Row] = []
        self.ready: set[str] = set()
        self.stopping = False
        wanted = settings.preload
        self.preload = list(cards) if wanted == "all" else [name for name in wanted.split(",") if name]

    def emit(self, report: Report | wire.Hello) -> None:
        with self.sending:
            wire.send(self.stream, report)

    def listen(self) -> None:
        while (order := wire.receive(self.stream)) is not None:
            self.orders.put(order)
        os._exit(0)

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        self.emit(wire.Hello())
        for model in self.preload:
            self.load(model)
        while True:
            self.take_orders()
            if self.stopping:
                return
            self.tick()

    def take_orders(self) -> None:
        if not self.rows:
            self.obey(self.wait())
            if self.rows:
                self.emit(Announce("step", 600.0))
        while not self.orders.empty():
            self.obey(self.orders.get())

    def wait(self) -> wire.Order:
        """The next order; as idle as the engine, and says so more often."""
        while True:
            self.emit(Announce("idle", IDLE))
            with contextlib.suppress(queue.Empty):
                return self.orders.get(timeout=IDLE / 300)

    def obey(self, order: wire.Order) -> None:
        match order:
            case ("submit", request):
                self.admit(request)
            case ("cancel", request_id):
                if any(row.request.id == request_id for row in self.rows):
                    self.fail(request_id, Cancelled("The request was cancelled."))
            case ("load", model_id):
                self.load(model_id)
            case ("unload", model_id):
                self.ready.discard(model_id)
                self.emit(ModelState(model_id, "absent"))
            case ("reload", cards, _):
                self.cards = cards
            case ("stop",):
                self.stopping = True

    def load(self, model: str) -> None:
        if model in self.ready:
            return
        seconds = float(os.environ.get("INSTEP_FAKE_LOAD", "0"))
        self.emit(Announce("load", seconds + 5))
        self.page.loads(model)
        self.emit(ModelState(model, "loading"))
        time.sleep(seconds)
        self.page.loads("")
        self.ready.add(model)
        rates = {self.cards[model].defaults.size: RATE}
        self.emit(ModelState(model, "ready", seconds=seconds, device_bytes=1_000_000, rates=rates))

    def admit(self, request: Request) -> None:
        if missing := set(request.recipe.models) - self.cards.keys():
            self.emit(Failure(request.id, ModelNotFound(f'There is no model "{min(missing)}".', param="model")))
            return
        if any(words(spec.condition).startswith("!load") for spec in request.images):
            self.ready.discard(request.recipe.model)
            self.emit(ModelState(request.recipe.model, "failed", "broken as asked"))
            self.emit(Failure(request.id, CheckpointError("broken as asked")))
            return
        self.load(request.recipe.model)
        new = (index for index in range(len(request.images)) if index not in request.delivery.done)
        apart = dict(request.delivery.apart)
        self.rows += [Row(request, index, apart=apart.get(index, -2)) for index in new]

    def fail(self, request_id: str, error: InstepError) -> None:
        self.rows = [row for row in self.rows if row.request.id != request_id]
        self.emit(Failure(request_id, error))

    def tick(self) -> None:
        time.sleep(STEP)
        for row in self.rows:
            row.started = row.started or time.monotonic()
        for model in sorted({row.request.recipe.model for row in self.rows}):
            batch = [row for row in self.rows if row.request.recipe.model == model and row.due][:CAP]
            if batch:
                self.forward(model, batch)

    def forward(self, model: str, batch: list[Row]) -> None:
        suspects = [row for row in batch if row.apart >= row.step]
        batch = suspects[:1] or batch
        self.page.computes([(row.request.id, row.index, row.step) for row in batch])
        for row in batch:
            row.step += 1
        passes = sum(2 if row.request.recipe.guidance.guided else 1 for row in batch)
        running = min(CAP, len(self.rows))
        waiting = len(self.rows) - running
        self.emit(Tick(model, "denoise", len(batch), passes, 0, 2 * CAP, STEP, running, waiting))
        for row in batch:
            if row in self.rows:
                self.settle(row)
        if suspects:
            self.page.computes([])

    def settle(self, row: Row) -> None:
        request, text = row.request, words(row.spec.condition)
        if row.step >= min(2, request.recipe.steps) and text.startswith("!"):
            self.misbehave(row, text)
        if row not in self.rows:
            return
        if request.delivery.progress:
            self.emit(Progress(request.id, row.index, row.step, request.recipe.steps))
        for partial in range(request.delivery.previews):
            if row.step < request.recipe.steps and row.step == (partial + 1) * request.recipe.steps // (
                request.delivery.previews + 1
            ):
                self.emit(Preview(request.id, row.index, partial, row.picture()))
        if row.step == request.recipe.steps:
            self.rows.remove(row)
            self.emit(self.result(row))

    def misbehave(self, row: Row, text: str) -> None:
        request = row.request
        if text.startswith("!nan"):
            if row.step < int(next(filter(str.isdigit, text.split()), 0)):
                return
            self.fail(
                request.id, EngineError("The network produced numbers that are not finite.", code="non_finite_output")
            )
        elif text.startswith("!oom"):
            self.fail(request.id, OutOfMemory("This image alone does not fit in the device's memory."))
        elif text.startswith("!die"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif text.startswith("!hang"):
            self.emit(Announce("step", 0.3))
            time.sleep(3600)
        elif text.startswith("!held") and row.step == 2:
            self.emit(Announce("step", 4.0))
            ctypes.PyDLL(None).sleep(int(text.split()[1]))
            self.emit(Announce("step", 600.0))

    def result(self, row: Row) -> Result:
        request, now = row.request, time.monotonic()
        latents = (
            np.zeros((4, request.recipe.height // 8, request.recipe.width // 8), np.float32)
            if request.delivery.keep_latents
            else None
        )
        timings = Timings(row.started - row.born, 0.0, now - row.started, 0.0, request.recipe.steps, 1.0)
        return Result(request.id, row.index, row.spec.seed, row.picture(), timings, latents)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire.beat(int(sys.argv[2]))
    stream = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
    if start := wire.receive(stream):
        _, settings, cards, _ = start
        FakeWorker(stream, wire.Page(int(sys.argv[3])), settings, cards).run()


if __name__ == "__main__":
    main()
