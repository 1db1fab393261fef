"""Waiting: the rows of one tenant and one key that wait, and in which order they would start.

Knows nothing of other tenants, of slots, or of how long a pass takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

from app.engine.row import Row

SLACK = 32
"""Entries of rows that no longer wait which the heaps may hold beside as many as do wait."""


class Lane:
    """Heaps over the same rows: by least remaining work, by the time they age, and the aged ones by arrival.

    A row that has left stays in them until it surfaces or there are too many such: its stage says that it is gone.
    `left` is how many wait, also those that are not in the heaps yet.
    """

    def __init__(self) -> None:
        self.left = 0
        self._shortest: list[tuple[int, int, float, int, Row]] = []
        self._oldest: list[tuple[float, int, Row]] = []
        self._aged: list[tuple[float, int, Row]] = []

    def push(self, row: Row, aged_at: float) -> None:
        """Put in a row that counts as aged after `aged_at`, on the engine's clock."""
        entry = (row.remaining, -row.request.delivery.priority, row.deadline, row.sequence, row)
        heapq.heappush(self._shortest, entry)
        heapq.heappush(self._oldest, (aged_at, row.sequence, row))

    def leave(self) -> None:
        """One of the rows waits no more."""
        self.left -= 1
        heaps: tuple[list[Any], ...] = (self._shortest, self._oldest, self._aged)
        if sum(map(len, heaps)) > 4 * self.left + SLACK:  # a waiting row is in two of them
            for heap in heaps:
                keep_waiting(heap)

    def best(self, now: float) -> Iterator[Row]:
        """Rows in the order in which they would start, each found as it is asked for: the aged by arrival first."""
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


def keep_waiting(heap: list[Any]) -> None:
    """Make a heap anew of the entries whose row, their last field, still waits."""
    heap[:] = [entry for entry in heap if entry[-1].stage == "waiting"]
    heapq.heapify(heap)


def _drop_gone(heap: list[Any]) -> None:
    while heap and heap[0][-1].stage != "waiting":
        heapq.heappop(heap)


def _in_order(heap: list[Any]) -> Iterator[Any]:
    """The entries of a heap, least first; the heap stays as it is, and only what is asked for is looked at."""
    front = [(heap[0], 0)] if heap else []
    while front:
        entry, index = heapq.heappop(front)
        yield entry
        for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
            heapq.heappush(front, (heap[child], child))
