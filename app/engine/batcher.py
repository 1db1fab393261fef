"""Batcher: who runs next. Tenants in turn, then least remaining work with an age limit; plain Python, no tensors.

Knows nothing of the network, the device, or what becomes of a row when its lines are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from app.engine.queue import Queue
from app.engine.row import Caps, Key, Row, Work
from app.engine.shares import Shares
from app.report import Phase


class Offer(NamedTuple):
    """What one key would run: its candidates, best first."""

    queue: Queue
    caps: Caps
    rows: list[Row]


class Batcher:
    """Rows by key, and the choice of the next Work: decode frees memory, encode fills it, denoise spends it.

    caps: the limits of a key, or None while they are not measured; asked again at every choice. A key that has 0 slots
    waits for room that others hold. resident(model, phase): whether the parts of that phase are on the device; a
    started row holds its network itself. held: models that take no new rows, because another waits for their memory.
    """

    def __init__(
        self, caps: Callable[[Key], Caps | None], resident: Callable[[str, Phase], bool] = lambda model, phase: True
    ) -> None:
        self._caps, self._resident = caps, resident
        self.held: frozenset[str] = frozenset()
        self._queues: dict[Key, Queue] = {}
        self.finished: list[Row] = []
        self._shares = Shares()
        self._encoded_last = False
        self.waiting = 0

    @property
    def started(self) -> list[Row]:
        """The rows that take part in forwards."""
        return [row for queue in self._queues.values() for row in queue.started]

    @property
    def running(self) -> int:
        return sum(len(queue.started) for queue in self._queues.values()) + len(self.finished)

    def add(self, row: Row) -> None:
        self._shares.join(row.request.tenant, row.request.weight)
        self._queues.setdefault(row.key, Queue(row.key, self._shares)).add(row)
        self.waiting += 1

    def start(self, row: Row) -> None:
        """The row is encoded and holds a slot: it takes part in forwards from now on."""
        row.stage = "started"
        self._queues[row.key].leave(row)
        self._queues[row.key].started.append(row)
        self.waiting -= 1

    def finish(self, row: Row) -> None:
        """The row has run its last line and waits to be decoded."""
        row.stage = "finished"
        self._queues[row.key].started.remove(row)
        self._queues[row.key].finished += 1
        self.finished.append(row)

    def remove(self, row: Row) -> None:
        """The row leaves, wherever it stands; nothing happens to one that is gone already."""
        stage, row.stage = row.stage, "gone"
        if stage != "gone":
            self._shares.leave(row.request.tenant)
        if stage == "waiting":
            self.waiting -= 1
            self._queues[row.key].leave(row)
        elif stage == "started":
            self._queues[row.key].started.remove(row)
        elif stage == "finished":
            self._queues[row.key].finished -= 1
            self.finished.remove(row)

    def charge(self, work: Work, seconds: float) -> None:
        """The device took so long for this work: its rows' tenants pay, each by its passes."""
        for row in work.rows:
            self._shares.charge(row.request.tenant, seconds * row.passes / work.passes)

    def doomed(self, now: float) -> list[Row]:
        """Waiting rows that could not be done by their deadline any more; each is told once."""
        rows = []
        for queue in self._queues.values():
            caps = self._caps(queue.key) if queue.arrivals else None
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
        if offers and not any(self._shares.has(offer.rows[0].request.tenant) for offer in offers):
            self._shares.begin_round({row.request.tenant for offer in offers for row in offer.rows})
            offers = self._offers(now)
        if self._encoded_last and any(row.stage == "started" for offer in offers for row in offer.rows):
            # Never two encodes in a row while rows wait to be denoised: those who run must not stand behind arrivals.
            offers = [offer for offer in map(_started_alone, offers) if offer.rows]
        if not offers:
            return None
        best = min(offers, key=lambda offer: offer.queue.order(offer.rows[0], now, offer.caps.rate))
        return _encode_or_denoise(best.rows, best.caps)

    def _offers(self, now: float) -> list[Offer]:
        """What each key could run. Where an aged row finds no slots, the other keys take no row younger than it."""
        able = [(queue, caps) for queue in self._queues.values() if (caps := self._caps(queue.key))]
        held = min((queue.aged_without_room(now, caps) for queue, caps in able), default=math.inf)
        offers = []
        for queue, caps in able:
            rows = [row for row in queue.candidates(now, caps) if self._able(row, held)]
            if rows:
                offers.append(Offer(queue, caps, rows))
        return offers

    def _able(self, row: Row, held: float) -> bool:
        """Whether the row may go now: its parts are there, and nobody who came before `held` waits for its room."""
        if row.stage == "started":
            return row.lease is not None
        model = row.key.model
        return row.arrived < held and model not in self.held and self._resident(model, "encode")


def _started_alone(offer: Offer) -> Offer:
    return offer._replace(rows=[row for row in offer.rows if row.stage == "started"])


def _encode_or_denoise(rows: list[Row], caps: Caps) -> Work:
    chosen = _fill(rows, caps.passes)
    entering = [row for row in chosen if row.stage == "waiting"]
    if entering:
        return Work("encode", rows[0].key, entering[: caps.encode])
    return Work("denoise", rows[0].key, chosen)


def _fill(rows: list[Row], passes: int) -> list[Row]:
    """The longest greedy choice in order that stays within `passes`; the first row always goes."""
    chosen: list[Row] = []
    left = passes
    for row in rows:
        if row.passes <= left or not chosen:
            chosen.append(row)
            left -= row.passes
        if left <= 0:
            break
    return chosen
