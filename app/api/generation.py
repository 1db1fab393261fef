"""Generation: one accepted request from submission to answer, with its place in the metrics and the log.

Knows nothing of bodies, events or status codes of the route that waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request

from app.api.front import Front, Record
from app.errors import Cancelled, InstepError
from app.jobs.replies import Ask
from app.logs import logger
from app.report import Preview, Progress, Result

OnReport = Callable[[Preview | Progress | Result], None]
T = TypeVar("T")

log = logger("instep.access")


@dataclass
class Generation:
    """`started`: when the request arrived, on the clock of `time.perf_counter()`."""

    front: Front
    record: Record
    ask: Ask
    started: float

    def submit(self, on_report: OnReport | None = None) -> asyncio.Future[list[Result]]:
        """Hand the request to the engine; cancelling the future cancels the request.

        Raises Unavailable, RateLimited and DeadlineExceeded at once.
        """
        model, images = self.ask.request.recipe.model, len(self.ask.request.images)
        future = self.front.supervisor.submit(self.ask.request, on_report, limit=self.record.key.queue)
        self.ask = replace(self.ask, estimate=future.estimate)
        self.front.metrics.started(model, images)
        future.add_done_callback(lambda _: self.front.metrics.ended(model, images))
        return future

    def answered(self, results: list[Result], image_encode: float) -> None:
        """Count and note a request that was answered in full."""
        total = time.perf_counter() - self.started
        self.front.metrics.answered(self.ask.request.recipe.model, results, total, image_encode)
        self.record.facts |= milliseconds(results, image_encode)

    def failed(self, error: Exception) -> InstepError:
        """Count and note an accepted request that failed; the full message is for the log, not for the client.

        Returns the error as it is to be told: what is not one of ours is a bug, and logged with its traceback.
        """
        if not isinstance(error, InstepError):
            log.exception("unhandled", request_id=self.record.id)
            error = InstepError(repr(error))
        code = error.code
        self.front.metrics.failed(self.ask.request.recipe.model, code)
        self.record.facts |= {"error": code, "detail": error.message}
        self.record.gone = self.record.gone or isinstance(error, Cancelled)
        return error


def milliseconds(results: list[Result], image_encode: float) -> dict[str, float]:
    """Where the time of the slowest image went, for the log."""
    slowest = max(results, key=lambda result: result.timings.queue + result.timings.denoise).timings
    stages = {"queue": slowest.queue, "encode": slowest.encode, "denoise": slowest.denoise}
    stages |= {"decode": slowest.decode, "image_encode": image_encode}
    return {f"{name}_ms": round(1000 * seconds, 1) for name, seconds in stages.items()}


async def unless_gone(request: Request, future: asyncio.Future[T]) -> T:
    """The future's result. Raises Cancelled, and cancels the future, as soon as the client has closed."""
    watcher: asyncio.Future[None] = asyncio.ensure_future(_gone(request))
    either: set[asyncio.Future[Any]] = {future, watcher}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Cancelled("The client left before the image was done.")
        return future.result()
    finally:
        watcher.cancel()
        future.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has disconnected. NOTE: only once the body is read, or this would eat it."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
