"""Queue: the rows of one key, the order among them, and which of those that wait may take a slot.

Knows nothing of other keys, of phases, or of who counts what a tenant has had.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter

from app.engine.row import Caps, Row
from app.engine.shares import Shares
from app.engine.waiting import SLACK, Lane
from app.request import Key

AGE_LIMIT = 8.0
"""A row that has waited this many times its own service time goes first (DESIGN: order of work)."""

LANES = 64
"""Most tenants of one key that a choice looks at, those with credit first: no forward is wider."""

Order = tuple[bool, int, float, int, float, int]


class Queue:
    """The rows of one key: a lane of those waiting for each tenant, a list of those started, and one ordering for all.

    finished: how many wait to be decoded; they hold their slots until then.

    Arrivals enter their lane once the key's rate is known, because the age limit is a multiple of it.
    """

    def __init__(self, key: Key, shares: Shares) -> None:
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
        """A row waits no more: it was started, or it is gone."""
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
        """Arrivals take their places in the lanes, now that a pass is known to take `rate` seconds."""
        for row in self.arrivals:
            if row.stage == "waiting":
                service = row.remaining * rate
                self._lanes[row.request.delivery.tenant].push(row, row.arrived + AGE_LIMIT * service)
                if row.deadline < math.inf:
                    heapq.heappush(self._latest, (row.deadline - service, row.sequence, row))
        self.arrivals.clear()

    def doomed(self, now: float) -> list[Row]:
        """Rows not begun whose deadline their own work no longer meets, even alone on the device; each is told once."""
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
        """How many rows may be encoded before they can run, beside `entering` ones that will: at most half of what an
        encode holds wait so, and they leave the last quarter of the slots alone."""
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
        """Who may take the last slots: rows shorter than any that holds one, because they leave soon, and rows of
        tenants that hold less than their share of the other slots. Alone, a tenant holds all of those."""
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
