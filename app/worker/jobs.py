"""Jobs: the front's record of a request in flight, what it is estimated to cost, and who was there when a worker died.

Knows nothing of processes or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from app.card import parse_size
from app.report import ModelState, Preview, Progress, Result
from app.request import ImageSpec, Request

DEFAULT_RATE = 0.05
"""Seconds a pass until a model has been measured: about SD3.5-large at 1024 px on one large GPU."""

OnReport = Callable[[Preview | Progress | Result], None]


@dataclass(eq=False, slots=True)
class Job:
    """One request in flight. `future` is what the caller awaits; results arrive in any order.

    lines: of its table, how often an image goes through the network (a Heun step is two).
    """

    request: Request
    future: asyncio.Future[list[Result]]
    lines: int
    on_report: OnReport | None = None
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def images_left(self) -> int:
        return len(self.request.images) - len(self.results)

    @property
    def passes_left(self) -> int:
        """Passes through the network of the images not yet answered, each counted whole."""
        return self.images_left * self.lines * (2 if self.request.guided else 1)

    def in_order(self) -> list[Result]:
        return [self.results[index] for index in range(len(self.request.images))]


def seconds_left(job: Job, state: ModelState | None) -> float:
    """Estimated device seconds until this job is answered, alone on a device where its model is in `state`."""
    return job.passes_left * rate(state, job.request.width, job.request.height)


def rate(state: ModelState | None, width: int, height: int) -> float:
    """Seconds a pass at width x height pixels: measured, or scaled by area from the nearest size, or DEFAULT_RATE."""
    if state is None or not state.rates:
        return DEFAULT_RATE
    exact = state.rates.get(f"{width}x{height}")
    if exact is not None:
        return exact
    pixels = width * height
    areas = {w * h: seconds for (w, h), seconds in ((parse_size(size), s) for size, s in state.rates.items())}
    nearest = min(areas, key=lambda area: abs(area - pixels))
    return areas[nearest] * pixels / nearest


class Deaths:
    """A short memory of what was in a process when it died, so that a poison request cannot kill for ever.

    Two requests are the same here when they ask for the same pictures: id, deadline and seeds do not count, because
    a client who tries again brings a new id, and a new seed where it named none. One success clears the name, so
    a popular prompt that was only a bystander is not condemned.
    """

    def __init__(self, *, limit: int = 2, memory: int = 256, seconds: float = 600.0) -> None:
        self.limit = limit
        self.memory = memory
        self.seconds = seconds
        self._seen: OrderedDict[Request, tuple[int, float]] = OrderedDict()

    def condemned(self, request: Request) -> bool:
        """Whether this request was present at `limit` deaths, the last of them less than `seconds` ago."""
        count, when = self._seen.get(fingerprint(request), (0, 0.0))
        return count >= self.limit and time.monotonic() - when < self.seconds

    def record(self, requests: Iterable[Request]) -> None:
        """A process died with these in it. Twins in one death count once."""
        now = time.monotonic()
        for mark in {fingerprint(request) for request in requests}:
            count, when = self._seen.pop(mark, (0, now))
            self._seen[mark] = (count + 1 if now - when < self.seconds else 1, now)
        while len(self._seen) > self.memory:
            self._seen.popitem(last=False)

    def clear(self, request: Request) -> None:
        """This request was answered: it kills nobody."""
        if self._seen:
            self._seen.pop(fingerprint(request), None)


def fingerprint(request: Request) -> Request:
    """The request without what changes between two tries of it."""
    images = tuple(ImageSpec(spec.condition, 0) for spec in request.images)
    return replace(request, id="", deadline=None, images=images)
