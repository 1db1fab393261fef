"""Keeper: keeps one device's engine process alive: starts it, restarts it with back-off, and keeps its books.

Knows nothing of which request should go where.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from app.errors import InstepError, NoWorker
from app.report import Memory, ModelState, Report, Result, State, Tick
from app.worker import wire
from app.worker.backlog import Backlog
from app.worker.costs import Costs
from app.worker.jobs import Job
from app.worker.link import Link

FIRST_DELAY = 0.5
"""Seconds before the first restart; doubles to LAST_DELAY, and starts over after HEALTHY seconds of life."""
LAST_DELAY = 30.0
HEALTHY = 60.0

_ORDER: tuple[State, ...] = ("ready", "loading", "failed", "absent")

log = logging.getLogger("instep.worker")


def best(model: str, states: Iterable[ModelState | None]) -> ModelState:
    """The most useful of a model's states; "absent" when there is none."""
    known = [state for state in states if state is not None]
    return min(known, key=lambda state: _ORDER.index(state.state), default=ModelState(model, "absent"))


def merge(old: ModelState | None, new: ModelState) -> ModelState:
    """What is known of a model in one process after `new`: the rate of a size stays until it is measured again."""
    if old is None:
        return new
    new = replace(new, rates={**old.rates, **new.rates})
    if old.state != new.state:
        return new
    return replace(new, seconds=new.seconds or old.seconds, device_bytes=new.device_bytes or old.device_bytes)


class Keeper:
    """One entry of DEVICES. `hear(keeper, report)` gets the reports, `bury(keeper, reason)` each death."""

    def __init__(
        self,
        device: str,
        command: Sequence[str],
        start: wire.Start,
        hear: Callable[[Keeper, Report], None],
        bury: Callable[[Keeper, str], None],
    ) -> None:
        self.device = device
        self.jobs: dict[str, Job] = {}
        self.backlog = Backlog(costs := Costs())
        self._costs = costs
        self.states: dict[str, ModelState] = {}
        self.memory = Memory(device, {})
        self._were_ready: set[str] = set()
        self.restarts = 0
        self.back_in = 5.0
        self._command = command
        self._start = start
        self._hear = hear
        self._bury = bury
        self._tick: Tick | None = None
        self._rows: dict[str, int] = {}
        self._refusal: InstepError | None = None
        self._end = "ended"
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._born = 0.0
        self._startup = 5.0
        self._delay = FIRST_DELAY
        self._said_hello = False
        self._greeted = asyncio.Event()
        self._stopping = False

    @property
    def live(self) -> bool:
        """Whether the process has said Hello and is not known to be gone."""
        return self._said_hello and self._link is not None and self._link.open

    @property
    def pid(self) -> int:
        """The process's id; 0 while there is none."""
        return self._link.pid if self._link else 0

    @property
    def queued_seconds(self) -> float:
        """Estimated device seconds of what this worker has not yet answered."""
        return self.backlog.seconds

    @property
    def images(self) -> int:
        """Images not yet answered."""
        return self.backlog.images

    @property
    def running(self) -> int:
        """Images in a batch or encoded for the next, as of the last Tick."""
        return min(self.images, self._tick.running if self._tick else 0)

    @property
    def batched(self) -> dict[str, int]:
        """Images in the last denoising forward of each model that has work here, less those answered since."""
        return {model: min(rows, self.backlog.images_of(model)) for model, rows in self._rows.items()}

    def state(self, model: str) -> State:
        """How the model stands here."""
        known = self.states.get(model)
        return known.state if known else "absent"

    def proved(self, model: str) -> bool:
        """Whether this process has had the model ready, and has not failed to load it since."""
        return model in self._were_ready and self.state(model) != "failed"

    def send(self, order: wire.Order) -> None:
        """To the live process; otherwise nowhere."""
        if self._link and self.live:
            self._link.send(order)

    def take(self, job: Job) -> None:
        """This request goes here."""
        self.jobs[job.request.id] = job
        self.backlog.add(job.kind, job.images_left, job.request.delivery.weight)
        self.send(wire.Submit(job.request))

    def answer(self, job: Job, result: Result) -> None:
        """One image of this request is done."""
        if result.index not in job.results:
            self.backlog.drop(job.kind, 1)
        job.results[result.index] = result

    def drop(self, job: Job) -> None:
        """This request is over. What the last Ticks told of rows is true no more once nothing is left."""
        if self.jobs.pop(job.request.id, None) and job.images_left:
            self.backlog.drop(job.kind, job.images_left)
        if not self.jobs:
            self._tick = None
        if not self.backlog.images_of(job.request.recipe.model):
            self._rows.pop(job.request.recipe.model, None)

    def forget(self) -> list[str]:
        """Drop what the dead process had; the models it knew."""
        known, self.states, self._tick = list(self.states), {}, None
        self._were_ready.clear()
        return known

    async def start(self) -> None:
        """Start the process and wait for its Hello. Raises its refusal, or NoWorker when it ended before that."""
        self._task = asyncio.create_task(self._keep())
        greeting = asyncio.create_task(self._greeted.wait())
        try:
            await asyncio.wait({self._task, greeting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            greeting.cancel()
        if not self._greeted.is_set():
            self._task.result()
            raise self._refusal or NoWorker(f"The engine process on {self.device} {self._end} before it was ready.")

    async def stop(self) -> None:
        """End the process for good."""
        self._stopping = True
        if self._link and self._task:
            await self._link.end()
            await asyncio.wait({self._task}, timeout=1.0)
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _keep(self) -> None:
        """Live, die, wait, live again; ends when stopped, or when the very first process never says Hello."""
        while not self._stopping:
            self._born = time.monotonic()
            self._link = Link(self._command, self._listen)
            try:
                reason = await self._link.run(self._start)
            except Exception as error:
                # NOTE: a bug of ours, or a limit of this machine. Without this the device would never be tried again.
                log.exception("the watch over the engine process on %s broke", self.device)
                reason = f"lost its watch ({type(error).__name__}): killed"
            finally:
                self._said_hello, self._link = False, None
            self._end = reason
            if time.monotonic() - self._born > HEALTHY:
                self._delay = FIRST_DELAY
            self.back_in = self._delay + self._startup
            self._bury(self, reason)
            if self._stopping:
                return
            log.error("engine process on %s %s; next try in %.1f s", self.device, reason, self._delay)
            if not self._greeted.is_set():
                return
            await asyncio.sleep(self._delay)
            self._delay = min(LAST_DELAY, 2 * self._delay)
            self.restarts += 1

    def _listen(self, message: wire.Word) -> None:
        match message:
            case wire.Hello(pid):
                self._startup = time.monotonic() - self._born
                self._said_hello = True
                self._greeted.set()
                log.info("engine process %d on %s ready in %.1f s", pid, self.device, self._startup)
            case wire.Refusal(error):
                self._refusal = error
                log.error("engine process on %s refuses: %s", self.device, error.message)
            case ModelState(model):
                self.states[model] = merge(self.states.get(model), message)
                self._costs.hear(message)
                if message.state == "ready":
                    self._were_ready.add(model)
                self._hear(self, message)
            case Tick():
                self._tick = message
                if message.phase == "denoise" and message.rows:
                    self._rows[message.model] = message.rows
                self._costs.hear(message)
                self._hear(self, message)
            case _:
                self._hear(self, message)
