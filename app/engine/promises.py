"""Promises: the requests that are not answered yet, their rows and their deadlines.

Knows nothing of order, of the device, or of how an answer travels.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from app.engine.row import Row
from app.request import Key, Request


@dataclass(slots=True)
class _Promise:
    request: Request
    rows: list[Row]
    left: int


class Promises:
    """Open requests by id. A request is kept until its last image is done, or broken as a whole."""

    def __init__(self) -> None:
        self._open: dict[str, _Promise] = {}
        self._deadlines: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._open))

    def make(self, request: Request, rows: list[Row]) -> None:
        self._open[request.id] = _Promise(request, rows, len(rows))
        if request.delivery.deadline is not None:
            heapq.heappush(self._deadlines, (request.delivery.deadline, request.id))

    def keep(self, row: Row) -> None:
        """One image of its request is done."""
        promise = self._open[row.request.id]
        promise.left -= 1
        if promise.left == 0:
            del self._open[row.request.id]

    def abandon(self, request_id: str) -> list[Row]:
        """Forget a request and return its rows; none for one that is answered already or was never made."""
        promise = self._open.pop(request_id, None)
        return promise.rows if promise else []

    def of(self, model: str, key: Key | None = None) -> list[str]:
        """Ids of the open requests of a model, or of one key of it; all rows of a request have the same key."""
        keys = {request_id: promise.rows[0].key for request_id, promise in self._open.items()}
        return [request_id for request_id, own in keys.items() if own.model == model and key in (None, own)]

    def expired(self, now: float) -> list[str]:
        """Ids whose deadline has passed, each told once; some may be answered already."""
        if len(self._deadlines) > 2 * len(self._open) + 64:  # most are of requests answered long ago
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._open]
            heapq.heapify(self._deadlines)
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            late.append(heapq.heappop(self._deadlines)[1])
        return late
