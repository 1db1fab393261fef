"""Crowd: what keeps many clients from holding the event loop: requests take turns, and those who ask the same share."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

SWITCH = 0.001
"""Seconds that a thread may compute while the event loop waits for the interpreter's lock; 5 ms is Python's own."""


def steady() -> None:
    """Keep the interpreter from holding up a server that has started.

    Threads take short turns, and the garbage collector leaves alone what is there by now: a full pass took 0.2 s.
    """
    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()


class Turns:
    """A queue in which one request goes on in each turn of the event loop, so that sockets and probes come between."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Wait for the next free turn, in order of arrival. What follows should hold the loop for a few ms at most."""
        async with self._lock:
            await asyncio.sleep(0)


class SingleFlight:
    """Work whose result is shared by all who ask for it before it starts.

    Whoever asks while it runs waits for the next run, so a result is never older than the question.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Any]] = {}
        self._next: dict[Hashable, asyncio.Future[Any]] = {}

    async def run(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What `make` returns. key: the same for work with the same result."""
        if key not in self._next:
            self._next[key] = asyncio.ensure_future(self._run(key, make))
        result: T = await asyncio.shield(self._next[key])
        return result

    async def _run(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        if before := self._running.get(key):
            await asyncio.wait([before])
        self._running[key] = self._next.pop(key)
        try:
            return await make()
        finally:
            del self._running[key]
