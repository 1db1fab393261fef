"""Turns: which models' weights should come to the device now, and who has to make room for them.

Knows nothing of bytes or files: the pool moves weights, and says whether what is asked for is blocked.

Models that fit together run together, and then nothing here holds anybody. When one does not fit beside those that
run, these keep the device for the time that one of their images takes, or that the other takes to load, whichever is
longer, so that loading is at most half of what the device does; after that they take no new rows until it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from app.engine.row import Row
from app.pool.policy import Need
from app.report import Phase

ALL: tuple[Phase, ...] = ("encode", "denoise", "decode")
SMOOTH = 0.2
"""Weight of the newest image in the mean service time of its model."""


class Shelf(Protocol):
    """What is asked of the pool."""

    def resident(self, model_id: str, phase: Phase) -> bool: ...

    def fits(self, model_id: str) -> bool: ...

    @property
    def blocked(self) -> bool: ...


class Standing(NamedTuple):
    """Models with rows by how these stand: finished ones, started ones that hold no network, started ones at all."""

    finished: list[str]
    unheld: list[str]
    started: set[str]


class Plan(NamedTuple):
    """needs: for the pool, most urgent first. kept: models whose parts stay. held: models that take no new rows."""

    needs: list[Need]
    kept: frozenset[str]
    held: frozenset[str]


@dataclass(slots=True)
class _Turn:
    """since: when the model came to the device; service, load: mean seconds of an image, seconds of its last load."""

    here: bool = False
    since: float = 0.0
    service: float = 0.0
    load: float = 0.0


class Turns:
    """The waiting rows by model in order of arrival, and how long each model has had the device."""

    def __init__(self, shelf: Shelf, measured: Callable[[Row], bool]) -> None:
        """measured: whether the caps of a row's key are known; until then its network is needed before its text."""
        self._shelf, self._measured = shelf, measured
        self._waiting: dict[str, deque[Row]] = {}
        self._turns: dict[str, _Turn] = {}
        self._latest = ""

    def add(self, row: Row) -> None:
        """A row has arrived."""
        self._waiting.setdefault(row.key.model, deque()).append(row)

    def loaded(self, model: str, seconds: float) -> None:
        """A load took so long."""
        self._turn(model).load = seconds

    def served(self, model: str, seconds: float) -> None:
        """An image took so long from its first work to its pixels."""
        turn = self._turn(model)
        turn.service += (seconds - turn.service) * (SMOOTH if turn.service else 1.0)

    def plan(self, standing: Standing, now: float) -> Plan:
        """What to ask of the pool now."""
        urgent = [Need(model, ("decode",), urgent=True) for model in dict.fromkeys(standing.finished)]
        urgent += [Need(model, ("denoise",), urgent=True) for model in dict.fromkeys(standing.unheld)]
        heads = self._heads()
        absent = self._in_turn([head for head in heads if not self._here(head, now)], now)
        here = standing.started | {head.key.model for head in heads} - {head.key.model for head in absent}
        over = frozenset(model for model in here if absent and self._over(model, absent[0], now))
        if not all(self._shelf.resident(need.model, phase) for need in urgent for phase in need.phases):
            over = frozenset(here)  # rows that hold memory wait: who stands in their way takes no new ones
        needs = urgent + [Need(head.key.model, self._phases(head)) for head in absent]
        return Plan(needs, frozenset(here) - over, over if self._shelf.blocked else frozenset())

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
        if self._shelf.fits(head.key.model):
            return ALL
        return ("encode",) if self._measured(head) else ("denoise",)

    def _here(self, head: Row, now: float) -> bool:
        """Whether this model can take the row; notes when that began."""
        model = head.key.model
        turn = self._turn(model)
        was, turn.here = turn.here, all(self._shelf.resident(model, phase) for phase in self._phases(head))
        if turn.here and not was and self._latest != model:  # else its own parts took turns
            turn.since, self._latest = now, model
        return turn.here

    def _in_turn(self, absent: list[Row], now: float) -> list[Row]:
        """The same heads; that of the model which had the device last comes after the others once its turn is over.

        Else, where it is the oldest, the model would be brought back before the one that it has just made room for.
        """

        def spent(head: Row) -> bool:
            others = (other for other in absent if other is not head)
            return head.key.model == self._latest and any(self._over(self._latest, other, now) for other in others)

        return sorted(absent, key=spent)

    def _over(self, model: str, head: Row, now: float) -> bool:
        """Whether the model has had the device long enough, now that this row of another waits."""
        turn = self._turn(model)
        return now - max(turn.since, head.arrived) > max(turn.service, self._turn(head.key.model).load)

    def _turn(self, model: str) -> _Turn:
        return self._turns.setdefault(model, _Turn())


def standing(finished: Iterable[Row], started: Iterable[Row]) -> Standing:
    """How the rows stand that are no longer waiting."""
    started = list(started)
    return Standing(
        [row.key.model for row in finished],
        [row.key.model for row in started if row.lease is None],
        {row.key.model for row in started},
    )
