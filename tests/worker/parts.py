"""Parts of the worker tests: cards, requests, a supervisor on the fake worker that must end with empty books.

Knows nothing of torch.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from app.cards.card import Card
from app.report import Report
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.parts.requests import flat

FAKE = (sys.executable, str(Path(__file__).parent.parent / "fake_worker.py"))
PATIENCE = 20.0
"""Seconds after which a test gives up; no test measures time."""

_ids = count()


def card(model: str = "fake", **changes: object) -> Card:
    facts = {
        "id": model,
        "family": "sd3",
        "source": {"path": "."},
        "schedule": {"kind": "flow"},
        "defaults": {"sampler": "flow_euler", "num_inference_steps": 4, "guidance_scale": 0.0, "size": "32x32"},
        "limits": {"sizes": {"min": 16, "max": 64}},
    }
    return Card.model_validate(facts | changes)


CARDS = {name: card(name) for name in ("fake", "other")}


def request(text: str = "a cat", *, seeds: Sequence[int] = (1,), steps: int = 4, **changes: object) -> Request:
    facts = {
        "id": f"r{next(_ids)}",
        "model": "fake",
        "images": tuple(ImageSpec(Prompt(text), seed) for seed in seeds),
        "width": 32,
        "height": 32,
        "sampler": "flow_euler",
        "steps": steps,
        "guided": False,
        "guidance": 4.0,
        "text_length": 16,
    }
    return flat(**(facts | changes))


@dataclass
class Serving:
    """A started supervisor and everything that its observer was told, with the worker's name."""

    supervisor: Supervisor
    reports: list[tuple[Report, str]] = field(default_factory=list)

    def told(self, kind: type) -> list[Report]:
        return [report for report, _ in self.reports if isinstance(report, kind)]


@asynccontextmanager
async def serving(*, command: Sequence[str] = FAKE, **settings: object) -> AsyncIterator[Serving]:
    """Start, yield, stop; whatever happened, nothing may be left on the books, and no process may live on."""
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
    assert (supervisor.running, supervisor.waiting, supervisor.live) == (0, 0, 0)


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds. Raises TimeoutError after PATIENCE."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on a new event loop; one that gets stuck fails."""
    asyncio.run(asyncio.wait_for(scenario(), 3 * PATIENCE))
