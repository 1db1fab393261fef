"""Batcher: who runs next. Least remaining work first, with an age limit; plain Python, no tensors.

Knows nothing of the network, the device, or what becomes of a row when its lines are done.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from app.engine.row import Caps, Key, Row, Work

AGE_LIMIT = 8.0
"""A row that has waited this many times its own service time goes first (DESIGN: order of work)."""

Order = tuple[int, float, int, float, int]


class Queue:
    """The rows of one key: a heap of those waiting, a list of those started, and one ordering for both.

    A cancelled waiting row stays in the heaps until it surfaces, or until half of them are such: its stage says that
    it is gone.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.started: list[Row] = []
        self._arrivals: list[Row] = []
        self._shortest: list[tuple[int, int, float, int, Row]] = []
        self._oldest: list[tuple[float, int, Row]] = []
        self._aged: list[tuple[float, int, Row]] = []
        self._gone = 0

    def add(self, row: Row) -> None:
        self._arrivals.append(row)

    def forget(self) -> None:
        """A waiting row is gone; when most of the heaps are such, they are made anew without them."""
        self._gone += 1
        if 2 * self._gone > len(self._shortest) + len(self._arrivals):
            self._arrivals = [row for row in self._arrivals if row.stage == "waiting"]
            heaps: tuple[list[Any], ...] = (self._shortest, self._oldest, self._aged)
            for heap in heaps:
                heap[:] = [entry for entry in heap if entry[-1].stage == "waiting"]
                heapq.heapify(heap)
            self._gone = 0

    @property
    def empty(self) -> bool:
        return not (self.started or self._arrivals or self._shortest)

    def order(self, row: Row, now: float, rate: float) -> Order:
        """Smaller runs first: aged rows by arrival, then least remaining seconds, priority, deadline."""
        waited = now - row.arrived - row.served
        if waited > AGE_LIMIT * row.lines * row.passes * rate:
            return (0, row.arrived, 0, 0.0, row.sequence)
        return (1, row.remaining * rate, -row.request.priority, row.deadline, row.sequence)

    def candidates(self, now: float, caps: Caps) -> list[Row]:
        """Rows that could share the next forward, best first: all started ones and the best few that may start."""
        self._admit(caps.rate)
        room = caps.slots - len(self.started)
        waiting = self._best_waiting(now, min(caps.passes, room)) if room > 0 else []
        if waiting and room <= caps.slots // 4:
            # The last quarter of the slots is for rows shorter than any that holds one: they leave soon.
            shortest = min((row.remaining for row in self.started), default=math.inf)
            waiting = [row for row in waiting if row.remaining < shortest]
        return sorted(self.started + waiting, key=lambda row: self.order(row, now, caps.rate))

    def _admit(self, rate: float) -> None:
        """Arrivals enter the heaps once the key's rate is known, because the age limit is a multiple of it."""
        for row in self._arrivals:
            entry = (row.remaining, -row.request.priority, row.deadline, row.sequence, row)
            heapq.heappush(self._shortest, entry)
            aged_at = row.arrived + AGE_LIMIT * row.remaining * rate
            heapq.heappush(self._oldest, (aged_at, row.sequence, row))
        self._arrivals.clear()

    def _best_waiting(self, now: float, most: int) -> list[Row]:
        while self._oldest and (self._oldest[0][0] < now or self._oldest[0][2].stage != "waiting"):
            row = heapq.heappop(self._oldest)[2]
            if row.stage == "waiting":
                heapq.heappush(self._aged, (row.arrived, row.sequence, row))
        aged = [entry[-1] for entry in _peek(self._aged, most)]
        short = [entry[-1] for entry in _peek(self._shortest, most + len(aged))]
        return list(dict.fromkeys(aged + short))[:most]


def _peek(heap: list[Any], most: int) -> list[Any]:
    """The `most` smallest entries whose row still waits; entries of other rows met on the way are dropped."""
    found: list[Any] = []
    while heap and len(found) < most:
        entry = heapq.heappop(heap)
        if entry[-1].stage == "waiting":
            found.append(entry)
    for entry in found:
        heapq.heappush(heap, entry)
    return found


class Batcher:
    """Rows by key, and the choice of the next Work: decode frees memory, encode fills it, denoise spends it.

    caps: the limits of a key, or None while its model is not on the device; asked again at every choice.
    """

    def __init__(self, caps: Callable[[Key], Caps | None]) -> None:
        self._caps = caps
        self._queues: dict[Key, Queue] = {}
        self._finished: list[Row] = []
        self._encoded_last = False
        self.waiting = 0

    @property
    def running(self) -> int:
        return sum(len(queue.started) for queue in self._queues.values()) + len(self._finished)

    def add(self, row: Row) -> None:
        self._queues.setdefault(row.key, Queue(row.key)).add(row)
        self.waiting += 1

    def start(self, row: Row) -> None:
        """The row is encoded and holds a slot: it takes part in forwards from now on."""
        row.stage = "started"
        self._queues[row.key].started.append(row)
        self.waiting -= 1

    def finish(self, row: Row) -> None:
        """The row has run its last line and waits to be decoded."""
        row.stage = "finished"
        self._queues[row.key].started.remove(row)
        self._finished.append(row)

    def remove(self, row: Row) -> None:
        """The row leaves, wherever it stands; nothing happens to one that is gone already."""
        stage, row.stage = row.stage, "gone"
        if stage == "waiting":
            self.waiting -= 1
            self._queues[row.key].forget()
        elif stage == "started":
            self._queues[row.key].started.remove(row)
        elif stage == "finished":
            self._finished.remove(row)

    def next(self, now: float) -> Work | None:
        """The next Work, or None when nothing can run now."""
        self._queues = {key: queue for key, queue in self._queues.items() if not queue.empty}
        work = self._decode() or self._step(now)
        self._encoded_last = work is not None and work.phase == "encode"
        return work

    def _decode(self) -> Work | None:
        if not self._finished:
            return None
        key = self._finished[0].key
        caps = self._caps(key)
        most = caps.decode if caps else 1
        return Work("decode", key, [row for row in self._finished if row.key == key][:most])

    def _step(self, now: float) -> Work | None:
        """The best row of all keys decides which key runs; waiting rows it takes along are encoded first."""
        # Never two encodes in a row while rows wait to be denoised: those who run must not stand behind arrivals.
        denoise = self._encoded_last and any(queue.started for queue in self._queues.values())
        best: tuple[Order, Caps, list[Row]] | None = None
        for queue in self._queues.values():
            caps = self._caps(queue.key)
            rows = queue.candidates(now, caps) if caps else []
            if denoise:
                rows = [row for row in rows if row.stage == "started"]
            if not caps or not rows:
                continue
            order = queue.order(rows[0], now, caps.rate)
            if best is None or order < best[0]:
                best = (order, caps, rows)
        return _encode_or_denoise(best[2], best[1]) if best else None


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
