"""Front: the things that every route works with, in one bundle, and the facts gathered about one request for its log.

Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from fastapi import Request

from app.cards.catalog import Registry
from app.keys import ApiKey, Keyring
from app.metrics import Metrics
from app.settings import Settings
from app.worker.supervisor import Supervisor

T = TypeVar("T")


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
        """The result of `make`. key: the same for work with the same result."""
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


@dataclass(frozen=True)
class Front:
    """What create_app puts together.

    pool: threads for what would hold the event loop. flights: work that many clients ask for at once. turns: a request
    takes one before it computes.
    """

    settings: Settings
    registry: Registry
    supervisor: Supervisor
    metrics: Metrics
    keys: Keyring
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "imaging"))
    flights: SingleFlight = field(default_factory=SingleFlight)
    turns: Turns = field(default_factory=Turns)

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run what computes or reads files off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    async def shared(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What `make` returns, made once for all who wait for the same key; then they go on one a turn."""
        made = await self.flights.run(key, make)
        await self.turns.take()
        return made


def front_of(request: Request) -> Front:
    """The bundle of the app that this request reached, with the models that its key may use."""
    front, key = cast(Front, request.app.state.front), key_of(request)
    return replace(front, registry=front.registry.only(key.models)) if key.models else front


def key_of(request: Request) -> ApiKey:
    """Who asks; NOBODY until `app/api/auth.py` has looked at the key."""
    return cast(ApiKey, request.state.key)


def facts_of(request: Request) -> dict[str, Any]:
    """What this request's line of the log says beside id, route and status. NOTE: never a prompt."""
    return cast(dict[str, Any], request.state.facts)
