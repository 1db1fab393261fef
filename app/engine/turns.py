"""Turns: which models' weights should come to the device now, and which models make room for them.

Models that fit together run together. When one does not fit beside those that run, these keep the device for the time
that one of their images takes, or that the other takes to load, whichever is longer, so that loading is at most half of
what the device does; after that they take no new rows until it is in.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
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


class Turns:
    """How long each model has had the device, how long its images take, and how long its last load took, in seconds."""

    def __init__(self, pool: Pool, measured: Container[Key]) -> None:
        """measured: keys with known caps; the others need their network before their text."""
        self._pool, self._measured = pool, measured
        self._here: set[str] = set()
        self._since: dict[str, float] = {}
        self._service: dict[str, float] = {}
        self._loads: dict[str, float] = {}
        self._latest = ""

    def loaded(self, model: str, seconds: float) -> None:
        """Record how long a load took."""
        self._loads[model] = seconds

    def served(self, model: str, seconds: float) -> None:
        """Record how long an image took from its first work to its pixels."""
        mean = self._service.get(model, seconds)
        self._service[model] = mean + (seconds - mean) * SMOOTH

    def ask(self, heads: Sequence[Row], finished: Sequence[Row], started: Sequence[Row], now: float) -> frozenset[str]:
        """Tell the pool what rows need now; returns the models that may not start new rows.

        heads: the row of each model that has waited longest, oldest first.
        """
        whole, lacking = (row.key.model for row in finished), (row.key.model for row in started if row.lease is None)
        urgent: list[Parts] = [(model, ("decode",)) for model in dict.fromkeys(whole)]
        urgent += [(model, ("denoise",)) for model in dict.fromkeys(lacking)]
        absent = self._in_turn([head for head in heads if not self._arrived(head, now)], now)
        here = {row.key.model for row in started}
        here |= {head.key.model for head in heads} - {head.key.model for head in absent}
        over = frozenset(model for model in here if absent and self._over(model, absent[0], now))
        if not all(self._pool.resident(model, phase) for model, phases in urgent for phase in phases):
            over = frozenset(here)  # rows that hold memory wait: the models in their way take no new ones
        self._pool.need([(head.key.model, self._phases(head)) for head in absent], here - over, urgent)
        return over if self._pool.blocked else frozenset()

    def _phases(self, head: Row) -> tuple[Phase, ...]:
        """All parts at once where they fit together, else those of what the row does next."""
        if self._pool.fits(head.key.model):
            return ALL
        return ("encode",) if head.key in self._measured else ("denoise",)

    def _arrived(self, head: Row, now: float) -> bool:
        """Whether this model can take the row; records when that began."""
        model = head.key.model
        if not all(self._pool.resident(model, phase) for phase in self._phases(head)):
            self._here.discard(model)
            return False
        if model not in self._here and self._latest != model:  # else its own parts took turns
            self._since[model], self._latest = now, model
        self._here.add(model)
        return True

    def _in_turn(self, absent: list[Row], now: float) -> list[Row]:
        """The same heads, but that of the model which had the device last comes last once its turn is over, or it would
        be brought back before the one that it has just made room for."""

        def spent(head: Row) -> bool:
            others = (other for other in absent if other is not head)
            return head.key.model == self._latest and any(self._over(self._latest, other, now) for other in others)

        return sorted(absent, key=spent)

    def _over(self, model: str, head: Row, now: float) -> bool:
        """Whether the model has had the device long enough, now that this row of another waits."""
        took = max(self._service.get(model, 0.0), self._loads.get(head.key.model, 0.0))
        return now - max(self._since.get(model, 0.0), head.arrived) > took
