"""Batcher: who runs next. Tenants in turn, then least remaining work with an age limit; plain Python, no tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from app.engine.queue import Order, Queue
from app.engine.row import Caps, Row, Work
from app.engine.shares import FairShares
from app.report import Phase
from app.request import Key

TRIAL_FULL = 0.75
"""The part of a wider forward that ready rows must fill before it is tried."""

TRIAL_SLACK = 4.0
"""A forward is not tried wider where a row's deadline is nearer than so many times what is left of its own work."""


class Offer(NamedTuple):
    """The rows that one key could run, the best of those that wait first."""

    queue: Queue
    caps: Caps
    rows: list[Row]
    now: float

    def order(self, row: Row) -> Order:
        """The place of a row of this key among all rows of all keys."""
        return self.queue.order(row, self.now, self.caps.rate)

    def best(self) -> Order:
        """The place of its best row."""
        return min(map(self.order, self.rows))

    def most(self) -> int:
        """Passes of the next forward: the cap's, or a trial's when rows nearly fill it and no deadline is in danger."""
        trial = self.caps.trial
        if not trial or sum(row.passes for row in self.rows) < TRIAL_FULL * trial:
            return self.caps.passes
        spare = min(row.deadline - self.now - TRIAL_SLACK * row.remaining * self.caps.rate for row in self.rows)
        return trial if spare > 0 else self.caps.passes

    def fill(self) -> list[Row]:
        """The rows of the next forward: a greedy choice in order that stays within the cap; the best row always goes.

        Most steps need no sorting: all fit and none ends. Rows that end together are decoded in order.
        """
        left = self.most()
        if sum([row.passes for row in self.rows]) <= left and all([row.line + 1 < row.lines for row in self.rows]):
            return self.rows
        chosen: list[Row] = []
        for row in sorted(self.rows, key=self.order):
            if row.passes <= left or not chosen:
                chosen.append(row)
                left -= row.passes
            if left <= 0:
                break
        return chosen


class Batcher:
    """Rows by key, and the choice of the next Work: decode frees memory, encode fills it, denoise spends it.

    caps: the caps of a key, asked at every choice; None while they are not measured. A key that has 0 slots waits for
    room that others hold. resident(model, phase): whether the parts of that phase are on the device; a started row
    leases its network itself. held: models that take no new rows, because another waits for their memory.
    """

    def __init__(
        self, caps: Callable[[Key], Caps | None], resident: Callable[[str, Phase], bool] = lambda model, phase: True
    ) -> None:
        self._caps, self._resident = caps, resident
        self.held: frozenset[str] = frozenset()
        self._queues: dict[Key, Queue] = {}
        self.finished: list[Row] = []
        self._shares = FairShares()
        self._encoded_last = False
        self.waiting = 0

    @property
    def started(self) -> list[Row]:
        """The rows that take part in forwards, or may."""
        return [row for queue in self._queues.values() for row in queue.started]

    @property
    def running(self) -> int:
        return sum(len(queue.started) for queue in self._queues.values()) + len(self.finished)

    def add(self, row: Row) -> None:
        self._shares.join(row.request.delivery.tenant, row.request.delivery.weight)
        self._queues.setdefault(row.key, Queue(row.key, self._shares)).add(row)
        self.waiting += 1

    def start(self, row: Row) -> None:
        """An encoded row with a slot takes part in forwards from now on."""
        row.stage = "started"
        self._queues[row.key].leave(row)
        self._queues[row.key].started.append(row)
        self.waiting -= 1

    def finish(self, row: Row) -> None:
        """A row that has run its last line waits to be decoded."""
        row.stage = "finished"
        self._queues[row.key].started.remove(row)
        self._queues[row.key].finished += 1
        self.finished.append(row)

    def remove(self, row: Row) -> None:
        """Remove a row, whatever its stage; nothing happens to one that is gone already."""
        stage, row.stage = row.stage, "gone"
        if stage != "gone":
            self._shares.leave(row.request.delivery.tenant)
        if stage == "waiting":
            self.waiting -= 1
            self._queues[row.key].leave(row)
        elif stage == "started":
            self._queues[row.key].started.remove(row)
        elif stage == "finished":
            self._queues[row.key].finished -= 1
            self.finished.remove(row)

    def charge(self, work: Work, seconds: float) -> None:
        """Charge the rows' tenants for the seconds of a work, each by its passes."""
        passes: Counter[str] = Counter()
        for row in work.rows:
            passes[row.request.delivery.tenant] += row.passes
        each = seconds / passes.total()
        for tenant, count in passes.items():
            self._shares.charge(tenant, count * each)

    def doomed(self, now: float) -> list[Row]:
        """Rows not begun that cannot meet their deadline any more; each is returned once."""
        rows = []
        for queue in self._queues.values():
            caps = self._caps(queue.key) if queue.arrivals and not queue.empty else None  # asking has it measured
            if caps:
                queue.admit(caps.rate)
            rows += queue.doomed(now)
        return rows

    def next(self, now: float) -> Work | None:
        """The next Work, or None when nothing can run now."""
        self._queues = {key: queue for key, queue in self._queues.items() if not queue.empty}
        work = self._decode() or self._step(now)
        self._encoded_last = work is not None and work.phase == "encode"
        return work

    def _decode(self) -> Work | None:
        able = [row for row in self.finished if self._resident(row.key.model, "decode")]
        if not able:
            return None
        key = able[0].key
        caps = self._caps(key)
        most = caps.decode if caps else 1
        return Work("decode", key, [row for row in able if row.key == key][:most])

    def _step(self, now: float) -> Work | None:
        """The best row of all keys decides which key runs; waiting rows it takes along are encoded first."""
        offers = self._offers(now)
        if offers and not self._any_credit(offers):
            self._shares.begin_round({row.request.delivery.tenant for offer in offers for row in offer.rows})
            offers = self._offers(now)
        if self._encoded_last and any(row.stage == "started" for offer in offers for row in offer.rows):
            # Never two encodes in a row while rows wait to be denoised: those who run must not stand behind arrivals.
            offers = [offer for offer in map(_started_alone, offers) if offer.rows]
        if not offers:
            return None
        return _encode_or_denoise(min(offers, key=Offer.best) if len(offers) > 1 else offers[0])

    def _any_credit(self, offers: list[Offer]) -> bool:
        return any(self._shares.has(row.request.delivery.tenant) for offer in offers for row in offer.rows)

    def _offers(self, now: float) -> list[Offer]:
        """What each key could run. Where an aged row finds no slots, the other keys take no row younger than it."""
        able = [(queue, caps) for queue in self._queues.values() if (caps := self._caps(queue.key))]
        held = min((queue.aged_without_room(now, caps) for queue, caps in able), default=math.inf)
        offers = []
        for queue, caps in able:
            rows = [row for row in queue.candidates(now, caps) if self._able(row, held)]
            if rows:
                offers.append(Offer(queue, caps, rows, now))
        return offers

    def _able(self, row: Row, held: float) -> bool:
        """Whether the row may go now: its parts are there, and no row that came before `held` waits for its room."""
        if row.stage == "started":
            return row.lease is not None
        model = row.key.model
        return row.arrived < held and model not in self.held and self._resident(model, "encode")


def _started_alone(offer: Offer) -> Offer:
    return offer._replace(rows=[row for row in offer.rows if row.stage == "started"])


def _encode_or_denoise(offer: Offer) -> Work:
    """The next forward, or what comes before it: the encode of those in it that wait, and of a few who are next.

    Texts encoded together cost a half to a quarter of what they cost one by one.
    """
    chosen = offer.fill()
    entering = [row for row in chosen if row.stage == "waiting"]
    if not entering:
        return Work("denoise", offer.queue.key, chosen)
    following = [row for row in offer.rows if row.stage == "waiting" and row not in entering]
    ahead = offer.queue.ahead(offer.caps, len(entering))
    return Work("encode", offer.queue.key, (entering + following[:ahead])[: offer.caps.encode])
