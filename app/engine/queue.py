"""Queue: the rows of one key, the order among them, and which of those that wait may take a slot."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from app.engine.row import Caps, Row
from app.engine.shares import FairShares
from app.request import Key

AGE_LIMIT = 8.0
"""A row that has waited this many times its own service time goes first."""

LANES = 64
"""Most tenants of one key that a choice looks at, those with credit first: no forward is wider."""

SLACK = 32
"""Heaps may hold so many entries of rows that have left, beside as many as there are rows that wait."""

Order = tuple[bool, int, float, int, float, int]


class Lane:
    """The waiting rows of one tenant and one key in heaps: by remaining work, by when they age, the aged by arrival.

    A row that has left, which its stage shows, stays in them until it surfaces or there are too many such.
    `left` is how many wait, also those that are not in the heaps yet.
    """

    def __init__(self) -> None:
        self.left = 0
        self._shortest: list[tuple[int, int, float, int, Row]] = []
        self._oldest: list[tuple[float, int, Row]] = []
        self._aged: list[tuple[float, int, Row]] = []

    def push(self, row: Row, aged_at: float) -> None:
        """Add a row that counts as aged after `aged_at`, on the engine's clock."""
        entry = (row.remaining, -row.request.delivery.priority, row.deadline, row.sequence, row)
        heapq.heappush(self._shortest, entry)
        heapq.heappush(self._oldest, (aged_at, row.sequence, row))

    def leave(self) -> None:
        """Count one waiting row less."""
        self.left -= 1
        heaps: tuple[list[Any], ...] = (self._shortest, self._oldest, self._aged)
        if sum(map(len, heaps)) > 4 * self.left + SLACK:  # a waiting row is in two of them
            for heap in heaps:
                heap[:] = [entry for entry in heap if entry[-1].stage == "waiting"]
                heapq.heapify(heap)

    def best(self, now: float) -> Iterator[Row]:
        """Rows in the order in which they would start, found lazily: the aged by arrival first."""
        first = []
        for row in self.aged(now):
            first.append(row)
            yield row
        _drop_gone(self._shortest)
        for entry in _in_order(self._shortest):
            if entry[-1].stage == "waiting" and entry[-1] not in first:
                yield entry[-1]

    def aged(self, now: float) -> Iterator[Row]:
        """The aged rows, by arrival."""
        while self._oldest and (self._oldest[0][0] < now or self._oldest[0][-1].stage != "waiting"):
            row = heapq.heappop(self._oldest)[-1]
            if row.stage == "waiting":
                heapq.heappush(self._aged, (row.arrived, row.sequence, row))
        _drop_gone(self._aged)
        return (entry[-1] for entry in _in_order(self._aged) if entry[-1].stage == "waiting")


def _drop_gone(heap: list[Any]) -> None:
    while heap and heap[0][-1].stage != "waiting":
        heapq.heappop(heap)


def _in_order(heap: list[Any]) -> Iterator[Any]:
    """The entries of a heap, least first, found lazily; the heap does not change."""
    front = [(heap[0], 0)] if heap else []
    while front:
        entry, index = heapq.heappop(front)
        yield entry
        for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
            heapq.heappush(front, (heap[child], child))


class Queue:
    """The rows of one key: a lane of those waiting for each tenant, a list of those started, and one ordering for all.

    finished: how many wait to be decoded; they hold their slots until then. arrivals: rows that enter their lane once
    the key's rate is known, because the age limit is a multiple of it.
    """

    def __init__(self, key: Key, shares: FairShares) -> None:
        self.key = key
        self.started: list[Row] = []
        self.finished = 0
        self.arrivals: list[Row] = []
        self._shares = shares
        self._lanes: dict[str, Lane] = {}
        self._latest: list[tuple[float, int, Row]] = []

    def add(self, row: Row) -> None:
        self.arrivals.append(row)
        self._lanes.setdefault(row.request.delivery.tenant, Lane()).left += 1

    def leave(self, row: Row) -> None:
        """Remove a row that was started, or is gone."""
        lane = self._lanes[row.request.delivery.tenant]
        lane.leave()
        if not lane.left:
            del self._lanes[row.request.delivery.tenant]
        left = sum(lane.left for lane in self._lanes.values())
        if len(self._latest) > 2 * left + SLACK:
            self._latest = [entry for entry in self._latest if _unbegun(entry[-1])]
            heapq.heapify(self._latest)
        if len(self.arrivals) > 2 * left + SLACK:
            self.arrivals = [row for row in self.arrivals if row.stage == "waiting"]

    @property
    def empty(self) -> bool:
        return not (self.started or self.finished or self._lanes)

    def order(self, row: Row, now: float, rate: float) -> Order:
        """Smaller runs first: tenants with credit, aged rows by arrival, then least seconds, priority, deadline."""
        owing = not self._shares.has(row.request.delivery.tenant)
        waited = now - row.arrived - row.served
        if waited > AGE_LIMIT * row.total * rate:
            return (owing, 0, row.arrived, 0, 0.0, row.sequence)
        return (owing, 1, row.remaining * rate, -row.request.delivery.priority, row.deadline, row.sequence)

    def admit(self, rate: float) -> None:
        """Move arrivals into the lanes, now that a pass is known to take `rate` seconds."""
        for row in self.arrivals:
            if row.stage == "waiting":
                service = row.remaining * rate
                self._lanes[row.request.delivery.tenant].push(row, row.arrived + AGE_LIMIT * service)
                if row.deadline < math.inf:
                    heapq.heappush(self._latest, (row.deadline - service, row.sequence, row))
        self.arrivals.clear()

    def doomed(self, now: float) -> list[Row]:
        """Rows not begun that cannot meet their deadline any more, even alone on the device; each is returned once."""
        found = []
        while self._latest and self._latest[0][0] < now:
            row = heapq.heappop(self._latest)[-1]
            if _unbegun(row):
                found.append(row)
        return found

    def candidates(self, now: float, caps: Caps) -> list[Row]:
        """Rows that could share the next forward: all started ones, then the best few that may start, best first."""
        self.admit(caps.rate)
        room = caps.slots - len(self.started) - self.finished
        waiting = self._best_waiting(now, min(max(caps.passes, caps.trial), room), caps.rate) if room > 0 else []
        if waiting and room <= caps.slots // 4:
            waiting = self._last_quarter(waiting, caps.slots - caps.slots // 4)
        return self.started + waiting

    def ahead(self, caps: Caps, entering: int) -> int:
        """How many rows may be encoded before they can run, beside `entering` ones that will: at most half an encode,
        and none in the last quarter of the slots."""
        waiting = sum(not row.begun for row in self.started)
        open_slots = caps.slots - caps.slots // 4 - len(self.started) - self.finished - entering
        return max(0, min(caps.encode // 2 - waiting, open_slots))

    def aged_without_room(self, now: float, caps: Caps) -> float:
        """Arrival of the oldest aged row with credit, when this key has no slots at all; infinite otherwise."""
        self.admit(caps.rate)
        able = [lane for tenant, lane in self._lanes.items() if self._shares.has(tenant)] if not caps.slots else []
        return min((row.arrived for lane in able for row in itertools.islice(lane.aged(now), 1)), default=math.inf)

    def _best_waiting(self, now: float, most: int, rate: float) -> list[Row]:
        tenants = sorted(self._lanes, key=lambda tenant: not self._shares.has(tenant))[:LANES]
        lanes = (self._lanes[tenant].best(now) for tenant in tenants)
        return list(itertools.islice(heapq.merge(*lanes, key=lambda row: self.order(row, now, rate)), most))

    def _last_quarter(self, waiting: list[Row], open_slots: int) -> list[Row]:
        """The rows that may take the last slots: those shorter than any that holds one, because they leave soon, and
        those of tenants that hold less than their share of the other slots. Alone, a tenant holds all of those."""
        shortest = min((row.remaining for row in self.started), default=math.inf)
        held = Counter(row.request.delivery.tenant for row in self.started)
        each = open_slots / sum(self._shares.weight(tenant) for tenant in held.keys() | self._lanes.keys())
        chosen = []
        for row in waiting:
            tenant = row.request.delivery.tenant
            if row.remaining < shortest or held[tenant] < each * self._shares.weight(tenant):
                chosen.append(row)
                held[tenant] += 1
        return chosen


def _unbegun(row: Row) -> bool:
    """Whether the row waits, be it encoded already or not."""
    return row.stage == "waiting" or (row.stage == "started" and not row.begun)
