"""Jobs: the front's record of a request in flight, and who was there when a worker died.

Knows nothing of processes or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from app.report import Preview, Progress, Result
from app.request import Condition, Recipe, Request
from app.worker.admission import Estimate, Kind

Fingerprint = tuple[Recipe, tuple[Condition, ...]]
OnReport = Callable[[Preview | Progress | Result], None]


class Ticket(asyncio.Future[list[Result]]):
    """What the caller awaits: the results in image order, once they are there. Belongs to the running loop."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.estimate = estimate


@dataclass(eq=False, slots=True)
class Job:
    """One request in flight. Results arrive in any order. kind: of its images."""

    request: Request
    future: Ticket
    kind: Kind
    on_report: OnReport | None = None
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def images_left(self) -> int:
        return len(self.request.images) - len(self.results)

    def in_order(self) -> list[Result]:
        return [self.results[index] for index in range(len(self.request.images))]


class Deaths:
    """A short memory of what was in a process when it died, so that a poison request cannot kill for ever.

    Two requests are the same here when they ask for the same pictures: delivery and seeds do not count, because a
    client who tries again brings a new id, and a new seed where it named none; nor does whose key it is. One success
    clears the name, so a popular prompt that was only a bystander is not condemned.
    """

    def __init__(self, *, limit: int = 2, memory: int = 256, seconds: float = 600.0) -> None:
        self.limit = limit
        self.memory = memory
        self.seconds = seconds
        self._seen: OrderedDict[Fingerprint, tuple[int, float]] = OrderedDict()

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


def fingerprint(request: Request) -> Fingerprint:
    """What two tries of the same pictures have in common."""
    return request.recipe, tuple(spec.condition for spec in request.images)
