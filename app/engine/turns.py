"""Turns: which models' weights should come to the device now, and which models make room for them.

Models that fit together run together. When one does not fit beside those that run, these keep the device for the time
that one of their images takes, or that the other takes to load, whichever is longer, so that loading is at most half of
what the device does; after that they take no new rows until it is in.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.engine.row import Row
from app.report import Phase
from app.request import Key

if TYPE_CHECKING:
    from app.pool.policy import Parts
    from app.pool.pool import Pool

ALL: tuple[Phase, ...] = ("encode", "denoise", "decode")
SMOOTH = 0.2
"""Weight of the newest image in the mean service time of its model."""


@dataclass(slots=True)
class _Turn:
    """since: when the model came to the device; service, load: mean seconds of an image, seconds of its last load."""

    here: bool = False
    since: float = 0.0
    service: float = 0.0
    load: float = 0.0


class Turns:
    """The waiting rows by model in order of arrival, and how long each model has had the device."""

    def __init__(self, pool: Pool, measured: Container[Key]) -> None:
        """measured: keys with known caps; the others need their network before their text."""
        self._pool, self._measured = pool, measured
        self._waiting: dict[str, deque[Row]] = {}
        self._turns: defaultdict[str, _Turn] = defaultdict(_Turn)
        self._latest = ""

    def add(self, row: Row) -> None:
        """Add a row that has arrived."""
        self._waiting.setdefault(row.key.model, deque()).append(row)

    def loaded(self, model: str, seconds: float) -> None:
        """Record how long a load took."""
        self._turns[model].load = seconds

    def served(self, model: str, seconds: float) -> None:
        """Record how long an image took from its first work to its pixels."""
        turn = self._turns[model]
        turn.service += (seconds - turn.service) * (SMOOTH if turn.service else 1.0)

    def ask(self, finished: Sequence[Row], started: Sequence[Row], now: float) -> frozenset[str]:
        """Tell the pool what rows need now; returns the models that may not start new rows."""
        whole, lacking = (row.key.model for row in finished), (row.key.model for row in started if row.lease is None)
        urgent: list[Parts] = [(model, ("decode",)) for model in dict.fromkeys(whole)]
        urgent += [(model, ("denoise",)) for model in dict.fromkeys(lacking)]
        heads = self._heads()
        absent = self._in_turn([head for head in heads if not self._here(head, now)], now)
        here = {row.key.model for row in started}
        here |= {head.key.model for head in heads} - {head.key.model for head in absent}
        over = frozenset(model for model in here if absent and self._over(model, absent[0], now))
        if not all(self._pool.resident(model, phase) for model, phases in urgent for phase in phases):
            over = frozenset(here)  # rows that hold memory wait: the models in their way take no new ones
        self._pool.need([(head.key.model, self._phases(head)) for head in absent], here - over, urgent)
        return over if self._pool.blocked else frozenset()

    def _heads(self) -> list[Row]:
        """The row of each model that has waited longest, oldest first."""
        for model, rows in list(self._waiting.items()):
            while rows and rows[0].stage != "waiting":
                rows.popleft()
            if not rows:
                del self._waiting[model]
        return sorted((rows[0] for rows in self._waiting.values()), key=lambda row: row.sequence)

    def _phases(self, head: Row) -> tuple[Phase, ...]:
        """All parts at once where they fit together, else those of what the row does next."""
        if self._pool.fits(head.key.model):
            return ALL
        return ("encode",) if head.key in self._measured else ("denoise",)

    def _here(self, head: Row, now: float) -> bool:
        """Whether this model can take the row; records when that began."""
        model = head.key.model
        turn = self._turns[model]
        was, turn.here = turn.here, all(self._pool.resident(model, phase) for phase in self._phases(head))
        if turn.here and not was and self._latest != model:  # else its own parts took turns
            turn.since, self._latest = now, model
        return turn.here

    def _in_turn(self, absent: list[Row], now: float) -> list[Row]:
        """The same heads, but that of the model which had the device last comes last once its turn is over, or it would
        be brought back before the one that it has just made room for."""

        def spent(head: Row) -> bool:
            others = (other for other in absent if other is not head)
            return head.key.model == self._latest and any(self._over(self._latest, other, now) for other in others)

        return sorted(absent, key=spent)

    def _over(self, model: str, head: Row, now: float) -> bool:
        """Whether the model has had the device long enough, now that this row of another waits."""
        turn = self._turns[model]
        return now - max(turn.since, head.arrived) > max(turn.service, self._turns[head.key.model].load)
