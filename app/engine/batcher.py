"""Batcher: who runs next. Tenants in turn, then least remaining work with an age limit; plain Python, no tensors.

Turns: which models have the device, where not all of them fit.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from app.engine.queue import FairShares, Queue
from app.engine.row import Caps, Kit, Row, Work
from app.report import Phase
from app.request import Key

if TYPE_CHECKING:
    from app.pool.policy import Parts
    from app.pool.pool import Pool


HEADS = 64
"""Kits that the pool is asked for at once."""

ALL: tuple[Phase, ...] = ("encode", "denoise", "decode")
SMOOTH = 0.2
"""Weight of the newest image in the mean service time of its model."""


class Batcher:
    """Rows by key, and the choice of the next Work: decode frees memory, encode fills it, denoise spends it.

    caps: the caps of a key, asked at every choice; None while they are not measured. A key that has 0 slots waits for
    room that others take. resident(model, phase, adapters): whether the components of that phase are on the device; a
    started row leases its network itself. paused: kits that take no new rows, because another waits for their memory.
    loading: whether a model is being loaded: suspects wait meanwhile, so that another death has one cause.
    """

    def __init__(
        self,
        caps: Callable[[Key], Caps | None],
        resident: Callable[[str, Phase, tuple[str, ...]], bool] = lambda *parts: True,
    ) -> None:
        self._caps, self._resident = caps, resident
        self.paused: frozenset[Kit] = frozenset()
        self.loading = False
        self.queues: dict[Key, Queue] = {}
        self.finished: list[Row] = []
        self.shares = FairShares()
        self._due: list[tuple[float, int, Row]] = []
        self._here: dict[tuple[Kit, Phase], bool] = {}
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
        """The row of each kit that has waited longest, oldest first; of many kits the first ones."""
        firsts = [rows[0] for queue in self.queues.values() for rows in queue.kits.values()]
        heads: dict[Kit, Row] = {}
        for row in sorted(firsts, key=lambda row: row.sequence):
            heads.setdefault(row.kit, row)
        return list(heads.values())[:HEADS]

    def add(self, row: Row) -> None:
        self.shares.join(row.tenant, row.request.delivery.weight)
        self._queue(row)
        self._expect(row, row.deadline)

    def start(self, row: Row) -> None:
        """An encoded row with a slot takes part in forwards from now on."""
        row.stage = "started"
        self.queues[row.key].leave(row)
        self.queues[row.key].started.append(row)

    def switch(self, row: Row) -> None:
        """Queue a row that has run the last line of a leg for the model of the next, by its first arrival."""
        self.queues[row.key].started.remove(row)
        row.switch()
        self._queue(row)

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
        row.request = replace(row.request, source=None)  # `_due` keeps it until its deadline
        row.posterior = row.start = None
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
        self._here.clear()
        work = self._decode() or self._step(now)
        self._encoded_last = work is not None and work.phase in ("source", "encode")
        return work

    def _queue(self, row: Row) -> None:
        self.queues.setdefault(row.key, Queue(row.key, self.shares)).add(row)

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
                    self._expect(row, row.deadline - self._takes(row))
        return able

    def _takes(self, row: Row) -> float:
        """Seconds that the rest of a row takes alone on the device; a leg with a key not measured yet counts as 0."""
        measured = ((passes, self._caps(key)) for key, passes in row.ahead)
        return sum(passes * caps.rate for passes, caps in measured if caps)

    def _decode(self) -> Work | None:
        able = [row for row in self.finished if self._resident(row.key.model, "decode", ()) and not self._held(row)]
        if not able:
            return None
        key = able[0].key
        rows = _apart(able[0], [row for row in able if row.key == key])
        return Work("decode", key, rows[: self.queues[key].caps.decode])

    def _step(self, now: float) -> Work | None:
        """The best row of all keys decides which key runs; waiting rows it takes along are encoded first."""
        offers = self._offers(now)
        if offers and not any(self.shares.has(row.tenant) for rows in offers.values() for row in rows):
            self.shares.begin_round({row.tenant for rows in offers.values() for row in rows})
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
        if any(row.suspect for row in rows):
            rows = _apart(min(rows, key=lambda row: queue.order(row, now)), rows)
        return _encode_or_denoise(queue, rows, now)

    def _offers(self, now: float) -> dict[Queue, list[Row]]:
        """What each key could run. Where an aged row finds no slots, the other keys take no row younger than it."""
        able = self._admit()
        before = min((queue.aged_without_room(now) for queue in able), default=math.inf)
        offers = {
            queue: [row for row in queue.candidates(now, self._barred) if self._able(row, before)] for queue in able
        }
        return {queue: rows for queue, rows in offers.items() if rows}

    def _held(self, row: Row) -> bool:
        return self.loading and row.suspect

    def _barred(self, row: Row) -> bool:
        """Whether a waiting row lets those behind it pass: a suspect while a model loads, or its adapters are away."""
        return self._held(row) or (bool(row.adapters) and not self._has(row))

    def _has(self, row: Row) -> bool:
        """Whether what a waiting row needs next is on the device."""
        name = row.kit, row.needs
        if name not in self._here:
            self._here[name] = self._resident(row.key.model, row.needs, row.adapters)
        return self._here[name]

    def _able(self, row: Row, before: float) -> bool:
        """Whether the row may go now: its parts are there, and no row that came `before` waits for its room."""
        if self._held(row):
            return False
        if row.stage == "started":
            return row.lease is not None
        return row.arrived < before and row.kit not in self.paused and self._has(row)


def _apart(first: Row, rows: list[Row]) -> list[Row]:
    """The first row alone where it is suspect, else all but the suspects."""
    return [first] if first.suspect else [row for row in rows if not row.suspect]


def _encode_or_denoise(queue: Queue, rows: list[Row], now: float) -> Work:
    """The next forward. Where rows in it still wait, their sources come first, then their encode with a few more rows.

    All images of one source are one picture for the VAE. Texts encoded together cost a half to a quarter of what they
    cost one by one.
    """
    chosen = queue.fill(rows, now)
    entering = [row for row in chosen if row.stage == "waiting"]
    if not entering:
        return Work("denoise", queue.key, chosen)
    if unread := [row for row in entering if row.unread]:
        sources = list(dict.fromkeys(row.request.recipe.source for row in unread))[: queue.caps.decode]
        return Work("source", queue.key, [row for row in unread if row.request.recipe.source in sources])
    following = [row for row in rows if row.stage == "waiting" and row not in entering and not row.unread]
    ahead = queue.ahead(len(entering))
    return Work("encode", queue.key, (entering + following[:ahead])[: queue.caps.encode])


class Turns:
    """Which kits' weights should come to the device now, and which kits make room for them.

    Kits that fit together run together. When one does not fit beside those that run, these keep the device for the
    time that one of their images takes, or that the other takes to load, whichever is longer, so that loading is at
    most half of what the device does; after that they take no new rows until it is in.
    """

    def __init__(self, pool: Pool, measured: Container[Key]) -> None:
        """measured: keys with known caps; the others need their network before their text."""
        self._pool, self._measured = pool, measured
        self._here: set[Kit] = set()
        self._since: dict[Kit, float] = {}
        self._service: dict[str, float] = {}
        self._loads: dict[str, float] = {}
        self._latest: Kit = ("", ())

    def loaded(self, model: str, seconds: float) -> None:
        """Record how long a load took."""
        self._loads[model] = seconds

    def served(self, model: str, seconds: float) -> None:
        """Record how long an image took from its first work to its pixels."""
        mean = self._service.get(model, seconds)
        self._service[model] = mean + (seconds - mean) * SMOOTH

    def ask(self, heads: Sequence[Row], finished: Sequence[Row], started: Sequence[Row], now: float) -> frozenset[Kit]:
        """Tell the pool what rows need now; returns the kits that may not start new rows.

        heads: the row of each kit that has waited longest, oldest first.
        """
        whole, lacking = (row.key.model for row in finished), (row.kit for row in started if row.lease is None)
        urgent: list[Parts] = [(model, ("decode",), ()) for model in dict.fromkeys(whole)]
        urgent += [(model, ("denoise",), adapters) for model, adapters in dict.fromkeys(lacking)]
        absent = self._in_turn([head for head in heads if not self._arrived(head, now)], now)
        here = {row.kit for row in started} | ({head.kit for head in heads} - {head.kit for head in absent})
        self._here &= here
        self._since = {kit: since for kit, since in self._since.items() if kit in here or kit == self._latest}
        over = frozenset(kit for kit in here if absent and self._over(kit, absent[0], now))
        if not all(self._pool.resident(model, phase, used) for model, phases, used in urgent for phase in phases):
            over = frozenset(here)  # rows that hold memory wait: the kits in their way take no new ones
        stay = [(model, name) for model, adapters in here - over for name in adapters]
        stays = {model for model, _ in here - over}.union(stay)
        self._pool.need([(head.key.model, self._phases(head), head.adapters) for head in absent], stays, urgent)
        return over if self._pool.blocked else frozenset()

    def _phases(self, head: Row) -> tuple[Phase, ...]:
        """All parts at once where they fit together, else those of what the row does next."""
        if self._pool.fits(head.key.model, head.adapters):
            return ALL
        return (head.needs,) if head.key in self._measured else ("denoise",)

    def _arrived(self, head: Row, now: float) -> bool:
        """Whether its kit can take the row; records when that began."""
        kit = model, adapters = head.kit
        if not all(self._pool.resident(model, phase, adapters) for phase in self._phases(head)):
            self._here.discard(kit)
            return False
        if kit not in self._here and self._latest != kit:  # else its own parts took turns
            self._since[kit], self._latest = now, kit
        self._here.add(kit)
        return True

    def _in_turn(self, absent: list[Row], now: float) -> list[Row]:
        """The same heads, but that of the model which had the device last comes last once its turn is over, or it would
        be brought back before the one that it has just made room for."""

        def spent(head: Row) -> bool:
            others = (other for other in absent if other is not head)
            return head.kit == self._latest and any(self._over(self._latest, other, now) for other in others)

        return sorted(absent, key=spent)

    def _over(self, kit: Kit, head: Row, now: float) -> bool:
        """Whether the kit is in the way of this row of another, and has had the device long enough."""
        load = self._loads.get(head.key.model, 0.0) if head.key.model != kit[0] else 0.0
        took = max(self._service.get(kit[0], 0.0), load)
        return _in_the_way(kit, head.kit) and now - max(self._since.get(kit, 0.0), head.arrived) > took


def _in_the_way(kit: Kit, other: Kit) -> bool:
    """Whether a kit takes room on the device that rows of the other, which is not there, do not need."""
    return kit == other or kit[0] != other[0] or not set(kit[1]) <= set(other[1])
