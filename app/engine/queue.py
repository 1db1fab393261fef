"""Queue: the rows of one key, the order among them, and which of those that wait may take a slot; and fair shares."""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter

from app.engine.row import Caps, Kit, Row
from app.request import Key

AGE_LIMIT = 8.0
"""A row that has waited this many times its own service time goes first."""

LANES = 64
"""Most tenants of one key that a choice looks at, those with credit first: no forward is wider."""

TRIAL_FULL = 0.75
"""The part of a wider forward that ready rows must fill before it is tried."""

TRIAL_SLACK = 4.0
"""A forward is not tried wider where a row's deadline is nearer than so many times what is left of its own work."""

QUANTUM = 1.0
"""Seconds of the device that a tenant of weight 1 gets in a round. Within them its rows go by the batcher's order, so
that a short request ends before the turn passes on; a new tenant waits at most for one round of the others."""

DEBT = 4.0
"""Rounds that a tenant can owe. A row that only fills a forward which others leave room in is charged too; without
a bound it would pay for hours of an idle device as soon as the others come."""

LEAST = 0.001
"""A weight below this counts as this."""

UNMEASURED = Caps(passes=0, encode=0, decode=1, slots=0, rate=math.inf)

Order = tuple[bool, int, float, int, float, float, int]


class FairShares:
    """Credits of the tenants that have rows, or had some in this round or owe for them, in seconds of the device.

    Nobody has more than one quantum: idle tenants save up nothing. A credit stays to the end of its round, so that
    leaving and coming back brings nothing either.
    (Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995; our packets are forwards.)
    """

    def __init__(self, quantum: float = QUANTUM) -> None:
        self.credits: dict[str, float] = {}
        self._quantum = quantum
        self._quanta: dict[str, float] = {}
        self._rows: Counter[str] = Counter()

    def join(self, tenant: str, weight: float) -> None:
        """Count one more row of a tenant, which has this weight from now on."""
        self._quanta[tenant] = self._quantum * max(LEAST, weight)
        self.credits.setdefault(tenant, self._quanta[tenant])
        self._rows[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count one row less."""
        self._rows[tenant] -= 1

    def has(self, tenant: str) -> bool:
        """Whether the tenant has credit left in this round."""
        return self.credits.get(tenant, 0.0) > 0

    def weight(self, tenant: str) -> float:
        """The tenant's quantum: its weight beside the others'."""
        return self._quanta[tenant]

    def charge(self, tenant: str, seconds: float) -> None:
        """Charge a tenant for seconds of the device."""
        if tenant in self.credits:
            self.credits[tenant] = max(self.credits[tenant] - seconds, -DEBT * self._quanta[tenant])

    def begin_round(self, able: Iterable[str]) -> None:
        """Add as many rounds as it takes until one of `able`, the tenants with rows that can run, has credit."""
        rounds = min(math.floor(-self.credits[tenant] / self._quanta[tenant]) + 1 for tenant in able)
        for tenant, quantum in list(self._quanta.items()):
            self.credits[tenant] = min(self.credits[tenant] + rounds * quantum, quantum)
            if not self._rows[tenant] and self.credits[tenant] >= quantum:
                del self.credits[tenant], self._quanta[tenant], self._rows[tenant]


def _shortness(row: Row) -> tuple[int, int, float, float, int]:
    return row.remaining, -row.request.delivery.priority, row.deadline, row.arrived, row.sequence


_arrival, _aging = attrgetter("arrived", "sequence"), attrgetter("ages_at", "sequence")
_number = attrgetter("sequence")


class Lane:
    """The waiting rows of one tenant and one key in sorted lists: by remaining work and by when they age, those that
    have aged by arrival."""

    def __init__(self) -> None:
        self._shortest: list[Row] = []
        self._aging: list[Row] = []
        self._aged: list[Row] = []

    def push(self, row: Row) -> None:
        insort(self._shortest, row, key=_shortness)
        insort(self._aging, row, key=_aging)

    def remove(self, row: Row) -> bool:
        """Remove a row; returns whether some are left."""
        place = bisect_left(self._aged, _arrival(row), key=_arrival)
        if self._aged[place : place + 1] == [row]:
            del self._aged[place]
        else:
            del self._shortest[bisect_left(self._shortest, _shortness(row), key=_shortness)]
            del self._aging[bisect_left(self._aging, _aging(row), key=_aging)]
        return bool(self._shortest or self._aged)

    def best(self, now: float) -> Iterator[Row]:
        """Rows in the order in which they would start: the aged by arrival first."""
        return itertools.chain(self.aged(now), self._shortest)

    def aged(self, now: float) -> list[Row]:
        """The aged rows, by arrival."""
        while self._aging and self._aging[0].ages_at < now:
            row = self._aging.pop(0)
            del self._shortest[bisect_left(self._shortest, _shortness(row), key=_shortness)]
            insort(self._aged, row, key=_arrival)
        return self._aged


class Queue:
    """The rows of one key: those that wait, in a lane for each tenant, those that are started, and one order for all.

    caps: of the key, as the batcher asked for them last. kits: those that wait, by adapters, oldest first. arrivals:
    rows that enter their lane once the key's rate is known, because the age limit is a multiple of it. finished: how
    many wait to be decoded; they keep their slots until then.
    """

    def __init__(self, key: Key, shares: FairShares) -> None:
        self.key = key
        self.caps = UNMEASURED
        self.waiting: OrderedDict[Row, None] = OrderedDict()
        self.kits: dict[Kit, list[Row]] = {}
        self.arrivals: dict[Row, None] = {}
        self.started: list[Row] = []
        self.finished = 0
        self._shares = shares
        self._lanes: dict[str, Lane] = {}

    @property
    def empty(self) -> bool:
        return not (self.started or self.finished or self.waiting)

    def add(self, row: Row) -> None:
        """Add a row that has arrived."""
        self.waiting[row] = self.arrivals[row] = None
        insort(self.kits.setdefault(row.kit, []), row, key=_number)

    def leave(self, row: Row) -> None:
        """Remove a waiting row that is started, or gone."""
        kit = self.kits[row.kit]
        del self.waiting[row], kit[bisect_left(kit, row.sequence, key=_number)]
        if not kit:
            del self.kits[row.kit]
        if row in self.arrivals:
            del self.arrivals[row]
        elif not self._lanes[row.tenant].remove(row):
            del self._lanes[row.tenant]

    def admit(self) -> list[Row]:
        """Move arrivals into the lanes, now that the caps are known; returns them."""
        admitted = list(self.arrivals)
        for row in admitted:
            row.ages_at = row.arrived + row.served + AGE_LIMIT * row.total * self.caps.rate
            self._lanes.setdefault(row.tenant, Lane()).push(row)
        self.arrivals.clear()
        return admitted

    def order(self, row: Row, now: float) -> Order:
        """Smaller runs first: tenants with credit, aged rows by arrival, then least seconds, priority, deadline.

        The passes of a later leg count as if they took what those of this key do.
        """
        rate, owing = self.caps.rate, not self._shares.has(row.tenant)
        waited = now - row.arrived - row.served
        if waited > AGE_LIMIT * row.total * rate:
            return (owing, 0, row.arrived, 0, 0.0, 0.0, row.sequence)
        priority = -row.request.delivery.priority
        return (owing, 1, row.remaining * rate, priority, row.deadline, row.arrived, row.sequence)

    def candidates(self, now: float, held: Callable[[Row], bool] = lambda row: False) -> list[Row]:
        """Rows that could share the next forward: all started ones, then the best few that may start, best first, and
        none that is `held`."""
        caps = self.caps
        room = caps.slots - len(self.started) - self.finished
        waiting = self._best_waiting(now, min(max(caps.passes, caps.trial), room), held) if room > 0 else []
        if waiting and room <= caps.slots // 4:
            waiting = self._last_quarter(waiting, caps.slots - caps.slots // 4)
        return self.started + waiting

    def fill(self, rows: list[Row], now: float) -> list[Row]:
        """The rows of the next forward: a greedy choice in order that stays within the cap; the best row always goes.

        Most steps need no sorting: all fit and none ends. Rows that end together are decoded in order.
        """
        left = self._most(rows, now)
        if sum([row.passes for row in rows]) <= left and all([row.line + 1 < row.lines for row in rows]):
            return rows
        chosen: list[Row] = []
        for row in sorted(rows, key=lambda row: self.order(row, now)):
            if row.passes <= left or not chosen:
                chosen.append(row)
                left -= row.passes
            if left <= 0:
                break
        return chosen

    def ahead(self, entering: int) -> int:
        """How many rows may be encoded before they can run, beside `entering` ones that will: at most half an encode,
        and none in the last quarter of the slots."""
        waiting = sum(row.line == row.begins for row in self.started)
        open_slots = self.caps.slots - self.caps.slots // 4 - len(self.started) - self.finished - entering
        return max(0, min(self.caps.encode // 2 - waiting, open_slots))

    def aged_without_room(self, now: float) -> float:
        """Arrival of the oldest aged row with credit, when this key has no slots at all; infinite otherwise."""
        able = [lane for tenant, lane in self._lanes.items() if self._shares.has(tenant)] if not self.caps.slots else []
        return min((row.arrived for lane in able for row in lane.aged(now)[:1]), default=math.inf)

    def _most(self, rows: list[Row], now: float) -> int:
        """Passes of the next forward: the cap's, or a trial's when rows nearly fill it and no deadline is in danger."""
        caps = self.caps
        if not caps.trial or sum(row.passes for row in rows) < TRIAL_FULL * caps.trial:
            return caps.passes
        spare = min(row.deadline - now - TRIAL_SLACK * row.remaining * caps.rate for row in rows)
        return caps.trial if spare > 0 else caps.passes

    def _best_waiting(self, now: float, most: int, held: Callable[[Row], bool]) -> list[Row]:
        tenants = sorted(self._lanes, key=lambda tenant: not self._shares.has(tenant))[:LANES]
        lanes = (self._lanes[tenant].best(now) for tenant in tenants)
        rows = heapq.merge(*lanes, key=lambda row: self.order(row, now))
        return list(itertools.islice(itertools.filterfalse(held, rows), most))

    def _last_quarter(self, waiting: list[Row], open_slots: int) -> list[Row]:
        """The rows that may take the last slots: those shorter than any that holds one, because they leave soon, and
        those of tenants that hold less than their share of the other slots. Alone, a tenant holds all of those."""
        shortest = min((row.remaining for row in self.started), default=math.inf)
        taken = Counter(row.tenant for row in self.started)
        each = open_slots / sum(self._shares.weight(tenant) for tenant in taken.keys() | self._lanes.keys())
        chosen = []
        for row in waiting:
            if row.remaining < shortest or taken[row.tenant] < each * self._shares.weight(row.tenant):
                chosen.append(row)
                taken[row.tenant] += 1
        return chosen
