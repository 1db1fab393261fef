"""A supervisor on the fake worker, in this process, that must end with empty books; its cards and its requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from app.jobs.body import read_body
from app.jobs.job import Job, OnReport
from app.report import Report
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.parts import engine
from tests.parts.workers import FAKE

CARDS = {name: engine.card(name) for name in ("fake", "other")}
_ids = count()


def request(text: str = "a cat", *, seeds: Sequence[int] = (1,), **changes: Any) -> Request:
    """A request with an id of its own: an image of 4 steps without guidance for each seed."""
    images = tuple(ImageSpec(Prompt(text), seed) for seed in seeds)
    facts = {"images": images, "steps": 4, "guided": False, "guidance": 4.0, "keep_latents": False}
    return engine.request(f"r{next(_ids)}", **(facts | changes))


def job(asked: Request | str = "a cat", *, on_report: OnReport | None = None, **changes: Any) -> Job:
    """A job of this request, or of one for this text."""
    asked = request(asked, **changes) if isinstance(asked, str) else asked
    return Job(asked, CARDS.get(asked.recipe.model, CARDS["fake"]), read_body({}), on_report=on_report)


@dataclass
class Serving:
    """A started supervisor and every report that its observer got, with the worker's name."""

    supervisor: Supervisor
    reports: list[tuple[Report, str]] = field(default_factory=list)

    def told(self, kind: type) -> list[Report]:
        return [report for report, _ in self.reports if isinstance(report, kind)]


@asynccontextmanager
async def serving(*, command: Sequence[str] = FAKE, **settings: object) -> AsyncIterator[Serving]:
    """Start, yield, stop. Asserts that nothing is left on the books and that no process lives on, whatever happened."""
    told: list[tuple[Report, str]] = []
    facts = {"devices": "cpu", "preload": "fake"} | settings
    supervisor = Supervisor(Settings(**facts), CARDS, observe=lambda *report: told.append(report), command=command)
    await supervisor.start()
    try:
        yield Serving(supervisor, told)
    finally:
        await supervisor.stop(0)
        await asyncio.sleep(0)
    assert supervisor.queues == [0.0] * len(supervisor.queues)
    assert (supervisor.running, supervisor.waiting, supervisor.live, supervisor._bytes) == (0, 0, 0, 0)


def tenants(supervisor: Supervisor) -> dict[str, float]:
    """Estimated device seconds of the unanswered images of each tenant, on all workers."""
    return dict(sum((Counter(child.backlog.tenants()) for child in supervisor.children), Counter[str]()))
