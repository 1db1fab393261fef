"""Batcher: who runs next. Tenants in turn, then least remaining work with an age limit; plain Python, no tensors."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable

from app.engine.queue import FairShares, Queue
from app.engine.row import Caps, Row, Work
from app.report import Phase
from app.request import Key


class Batcher:
    """Rows by key, and the choice of the next Work: decode frees memory, encode fills it, denoise spends it.

    caps: the caps of a key, asked at every choice; None while they are not measured. A key that has 0 slots waits for
    room that others take. resident(model, phase): whether the components of that phase are on the device; a started
    row leases its network itself. held: models that take no new rows, because another waits for their memory.
    """

    def __init__(
        self, caps: Callable[[Key], Caps | None], resident: Callable[[str, Phase], bool] = lambda model, phase: True
    ) -> None:
        self._caps, self._resident = caps, resident
        self.held: frozenset[str] = frozenset()
        self.queues: dict[Key, Queue] = {}
        self.finished: list[Row] = []
        self.shares = FairShares()
        self._due: list[tuple[float, int, Row]] = []
        self._encoded_last = False

    @property
    def started(self) -> list[Row]:
        """The rows that take part in forwards, or may."""
        return [row for queue in self.queues.values() for row in queue.started]

    @property
    def running(self) -> int:
        return sum(len(queue.started) for queue in self.queues.values()) + len(self.finished)

    @property
    def waiting(self) -> int:
        return sum(len(queue.waiting) for queue in self.queues.values())

    def heads(self) -> list[Row]:
        """The row of each model that has waited longest, oldest first."""
        firsts = (next(iter(queue.waiting)) for queue in self.queues.values() if queue.waiting)
        heads: dict[str, Row] = {}
        for row in sorted(firsts, key=lambda row: row.sequence):
            heads.setdefault(row.key.model, row)
        return list(heads.values())

    def add(self, row: Row) -> None:
        self.shares.join(row.tenant, row.request.delivery.weight)
        self.queues.setdefault(row.key, Queue(row.key, self.shares)).add(row)
        self._expect(row, row.deadline)

    def start(self, row: Row) -> None:
        """An encoded row with a slot takes part in forwards from now on."""
        row.stage = "started"
        self.queues[row.key].leave(row)
        self.queues[row.key].started.append(row)

    def finish(self, row: Row) -> None:
        """A row that has run its last line waits to be decoded."""
        row.stage = "finished"
        self.queues[row.key].started.remove(row)
        self.queues[row.key].finished += 1
        self.finished.append(row)

    def remove(self, row: Row) -> None:
        """Remove a row, whatever its stage; nothing happens to one that is gone already."""
        stage, row.stage = row.stage, "gone"
        if stage == "gone":
            return
        self.shares.leave(row.tenant)
        if stage == "waiting":
            self.queues[row.key].leave(row)
        elif stage == "started":
            self.queues[row.key].started.remove(row)
        else:
            self.queues[row.key].finished -= 1
            self.finished.remove(row)

    def charge(self, work: Work, seconds: float) -> None:
        """Charge the rows' tenants for the seconds of a work, each by its passes."""
        passes: Counter[str] = Counter()
        for row in work.rows:
            passes[row.tenant] += row.passes
        each = seconds / passes.total()
        for tenant, count in passes.items():
            self.shares.charge(tenant, count * each)

    def late(self, now: float) -> list[Row]:
        """Rows past their deadline, and rows not begun that cannot meet it any more, even alone on the device."""
        self._admit()
        found = []
        while self._due and self._due[0][0] < now:
            row = heapq.heappop(self._due)[-1]
            if row.stage != "gone" and (not row.begun or row.deadline < now):
                found.append(row)
        return found

    def next(self, now: float) -> Work | None:
        """The next Work, or None when nothing can run now."""
        self.queues = {key: queue for key, queue in self.queues.items() if not queue.empty}
        work = self._decode() or self._step(now)
        self._encoded_last = work is not None and work.phase == "encode"
        return work

    def _expect(self, row: Row, latest: float) -> None:
        """Look at the row again after this time."""
        if row.deadline == math.inf:
            return
        if len(self._due) > 4 * (self.waiting + self.running) + 64:  # most are of rows that left long ago
            self._due = [entry for entry in self._due if entry[-1].stage != "gone"]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (latest, row.sequence, row))

    def _admit(self) -> list[Queue]:
        """Ask for the caps of all keys, let arrivals take part where they are known, and return those queues."""
        able = []
        for queue in self.queues.values():
            if caps := self._caps(queue.key):
                queue.caps = caps
                able.append(queue)
                for row in queue.admit() if queue.arrivals else ():
                    self._expect(row, row.deadline - row.remaining * caps.rate)
        return able

    def _decode(self) -> Work | None:
        able = [row for row in self.finished if self._resident(row.key.model, "decode")]
        if not able:
            return None
        key = able[0].key
        return Work("decode", key, [row for row in able if row.key == key][: self.queues[key].caps.decode])

    def _step(self, now: float) -> Work | None:
        """The best row of all keys decides which key runs; waiting rows it takes along are encoded first."""
        offers = self._offers(now)
        tenants = {row.tenant for rows in offers.values() for row in rows}
        if offers and not any(map(self.shares.has, tenants)):
            self.shares.begin_round(tenants)
            offers = self._offers(now)
        if self._encoded_last and any(row.stage == "started" for rows in offers.values() for row in rows):
            # Never two encodes in a row while rows wait to be denoised: those who run must not stand behind arrivals.
            started = {queue: [row for row in rows if row.stage == "started"] for queue, rows in offers.items()}
            offers = {queue: rows for queue, rows in started.items() if rows}
        if not offers:
            return None
        queue, rows = next(iter(offers.items()))
        if len(offers) > 1:
            queue, rows = min(offers.items(), key=lambda offer: min(offer[0].order(row, now) for row in offer[1]))
        return _encode_or_denoise(queue, rows, now)

    def _offers(self, now: float) -> dict[Queue, list[Row]]:
        """What each key could run. Where an aged row finds no slots, the other keys take no row younger than it."""
        able = self._admit()
        held = min((queue.aged_without_room(now) for queue in able), default=math.inf)
        offers = {queue: [row for row in queue.candidates(now) if self._able(row, held)] for queue in able}
        return {queue: rows for queue, rows in offers.items() if rows}

    def _able(self, row: Row, held: float) -> bool:
        """Whether the row may go now: its parts are there, and no row that came before `held` waits for its room."""
        if row.stage == "started":
            return row.lease is not None
        model = row.key.model
        return row.arrived < held and model not in self.held and self._resident(model, "encode")


def _encode_or_denoise(queue: Queue, rows: list[Row], now: float) -> Work:
    """The next forward, or what comes before it: the encode of those in it that wait, and of a few who are next.

    Texts encoded together cost a half to a quarter of what they cost one by one.
    """
    chosen = queue.fill(rows, now)
    entering = [row for row in chosen if row.stage == "waiting"]
    if not entering:
        return Work("denoise", queue.key, chosen)
    following = [row for row in rows if row.stage == "waiting" and row not in entering]
    ahead = queue.ahead(len(entering))
    return Work("encode", queue.key, (entering + following[:ahead])[: queue.caps.encode])
