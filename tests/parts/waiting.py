"""Waiting for something that another thread or process will do: in a test, and in a scenario on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

PATIENCE = 30.0
"""Seconds after which a test gives up; no test measures time."""


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def eventually(
    what: Callable[[], object],
    patience: float = PATIENCE,
    why: Callable[[], object] = lambda: "it did not happen",
    *,
    pause: float = 0.01,
    despite: type[Exception] | tuple[type[Exception], ...] = (),
) -> None:
    """Ask until the answer is true. Raises AssertionError after `patience` seconds, with what `why` returns.

    pause: seconds between two questions. despite: exceptions that count as no.
    """
    until = time.monotonic() + patience
    while True:
        try:
            if what():
                return
        except despite:
            pass
        assert time.monotonic() < until, why()
        time.sleep(pause)


async def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait on the event loop until the condition holds. Raises TimeoutError after `patience` seconds."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on a new event loop; one that gets stuck fails."""
    asyncio.run(asyncio.wait_for(scenario(), 2 * PATIENCE))
