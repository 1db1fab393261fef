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

from app.api.crowd import SingleFlight, Turns
from app.cards.catalog import Registry
from app.keys import NOBODY, ApiKey, Keyring
from app.metrics import Metrics
from app.settings import Settings
from app.worker.supervisor import Supervisor

T = TypeVar("T")


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


@dataclass
class Record:
    """One request as its log line will tell it. `facts` never holds a prompt. key: who asks."""

    id: str
    key: ApiKey = NOBODY
    status: int = 0
    gone: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def front_of(request: Request) -> Front:
    """The bundle of the app that this request reached, with the models that its key may use."""
    front, key = cast(Front, request.app.state.front), record_of(request).key
    return replace(front, registry=front.registry.only(key.models)) if key.models else front


def record_of(request: Request) -> Record:
    """The record that `app/api/access.py` opened for this request."""
    return cast(Record, request.state.record)
