"""A job: one request in flight in the front, from its valid body to its last picture."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from app.cards.card import Card
from app.errors import Cancelled, InstepError, InvalidValue
from app.imaging import LONGEST, Format, sheet_size
from app.jobs.body import ImageBody
from app.report import Failure, Preview, Progress, Result
from app.request import Prompt, Request

OnReport = Callable[[Preview | Progress | Result], None]

log = logging.getLogger("instep.worker")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was known when a job was accepted. wait: seconds until its turn; cost: device seconds of its own;
    position: jobs on its device that were not answered yet."""

    wait: float
    position: int
    cost: float


@dataclass(eq=False)
class Job:
    """What is asked, how it is answered, what was expected, and what came of it so far.

    `future` ends with the results in the order of the images, with the error of the engine, or cancelled: whoever has
    no more use for a job cancels it, and the engine drops it at the next step boundary. NOTE: a future keeps what waits
    for it; a callback that knows the job would keep its pictures until a pass of the garbage collector.

    `await job` is `result()` once it has ended, and cancels it with its task. `on_report` gets every report.

    format: of the files; raw: the file alone is the answer. id: in the log. started: when it came, on the clock of
    `time.perf_counter()`. facts: for its line of the log, which never has a prompt. imaging: seconds that its files
    took. accepted: when a server took it, on the clock of `time.monotonic()`. sent: how many engine processes got it;
    `on_restart` is called for each after the first. apart: lines by index, up to which that image shares no forward,
    because a process died there. refiner: the card of the recipe's refiner. place: its index in a batch. Raises
    InvalidValue: a sheet longer than its format can be.
    """

    request: Request
    card: Card
    body: ImageBody
    format: Format = "png"
    raw: bool = False
    id: str = ""
    started: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)
    on_report: OnReport | None = None
    estimate: Estimate | None = None
    imaging: float = 0.0
    accepted: float = field(default_factory=time.monotonic)
    sent: int = 0
    on_restart: Callable[[], None] | None = None
    apart: dict[int, int] = field(default_factory=dict)
    results: dict[int, Result] = field(default_factory=dict)
    refiner: Card | None = None
    place: int | None = None
    future: Future[list[Result]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        if self.columns:
            recipe = self.request.recipe
            width, height = sheet_size(len(self.request.images), self.columns, recipe.width, recipe.height)
            limit = LONGEST[self.format]
            if max(width, height) > limit:
                message = f"grid: the sheet has {width} x {height} pixels; a side of {self.format} has at most {limit}"
                raise InvalidValue(message, param="grid")

    @property
    def columns(self) -> int | None:
        """Columns of the sheet that was asked for; None for separate images."""
        return self.body.grid.columns if self.body.grid else None

    @property
    def shows(self) -> str:
        """What the first image shows: its prompt, or the name of its class."""
        condition = self.request.images[0].condition
        return condition.text if isinstance(condition, Prompt) else self.card.labels[condition.index]

    @property
    def images_left(self) -> int:
        """Images without a result."""
        return len(self.request.images) - len(self.results)

    @property
    def error(self) -> BaseException | None:
        """What it failed with; None where it is in flight, answered or cancelled."""
        return self.future.exception() if self.future.done() and not self.future.cancelled() else None

    def result(self) -> list[Result]:
        """The results of a job that has ended. Raises the error that it failed with, and Cancelled."""
        if self.future.cancelled():
            raise Cancelled("The client left before the image was done.")
        return self.future.result()

    def __await__(self) -> Generator[Any, None, list[Result]]:
        return self._ended().__await__()

    async def _ended(self) -> list[Result]:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self.future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        try:
            await ended.wait()
        finally:
            self.cancel()
        return self.result()

    def cancel(self) -> None:
        """Give it up; nothing happens to a job that has ended."""
        self.future.cancel()

    def fail(self, error: InstepError) -> None:
        """End it with this error, unless it has ended."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def send(self) -> Request:
        """The request for the next engine process, with what came of it so far."""
        if self.sent:
            self.facts["restarts"] = self.sent
            if self.on_restart:
                self.on_restart()
        self.sent += 1
        done, apart = frozenset(self.results), tuple(self.apart.items())
        delivery = replace(self.request.delivery, arrived=self.accepted, done=done, apart=apart)
        return replace(self.request, delivery=delivery)

    def hear(self, report: Preview | Progress | Result | Failure) -> None:
        """Take what the engine reports of it; the last result and a failure end it. Unheard once it has ended."""
        if self.future.done():
            return
        if isinstance(report, Failure):
            self.fail(report.error)
            return
        if isinstance(report, Result):
            self.results[report.index] = report
        try:
            if self.on_report:
                self.on_report(report)
        except Exception:
            log.exception("the listener of request %s failed", self.request.id)
        if not self.images_left:
            with suppress(InvalidStateError):
                self.future.set_result([self.results[index] for index in range(len(self.request.images))])
