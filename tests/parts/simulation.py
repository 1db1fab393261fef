"""A batcher on a virtual clock: what it chooses is done at once, a forward takes one second; no network, no tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from app.engine.batcher import Batcher
from app.engine.queue import Queue
from app.engine.row import Caps, Row, Work
from app.request import ImageSpec, Key, Prompt
from tests.parts.requests import flat

KEY = Key("model", 64, 64, 24)
OTHER = Key("other", 64, 64, 24)
Legs = tuple[tuple[Key, int], ...]
HELD: Any = object()
"""What stands for the lease of a row that has started."""

_sequence = itertools.count()


def row(steps: int, *, guided: bool = False, key: Key = KEY, legs: Legs = (), **request: Any) -> Row:
    """A row of so many lines; `add` says when it arrived. legs: as `Row.legs`."""
    number = next(_sequence)
    image = ImageSpec(Prompt("a"), number)
    asked = flat(f"r{number}", key.model, (image,), 64, 64, "euler", steps, 4.0, 24, guided=guided, **request)
    return Row(asked, 0, key, steps, 0.0, number, legs)


class Simulation:
    """Runs what the batcher chooses: an encode and a decode take no time, a forward takes one second."""

    def __init__(self, caps: Callable[[Key], Caps | None], away: str = "") -> None:
        """away: an adapter that is not on the device."""
        self.batcher = Batcher(caps, lambda model, phase, adapters: not away or away not in adapters)
        self.now = 0.0
        self.forwards: list[list[Row]] = []
        self.ended: dict[Row, float] = {}
        self.phases: list[str] = []

    def add(self, *rows: Row) -> None:
        for each in rows:
            each.arrived = self.now
            self.batcher.add(each)

    def turn(self) -> Work | None:
        work = self.batcher.next(self.now)
        if work is None:
            return None
        self.phases.append(work.phase)
        if work.phase == "encode":
            for each in work.rows:
                each.lease = HELD
                self.batcher.start(each)
        elif work.phase == "decode":
            for each in work.rows:
                self.batcher.remove(each)
        else:
            self._forward(work.rows)
            self.batcher.charge(work, 1.0)
        return work

    def _forward(self, rows: list[Row]) -> None:
        assert rows
        self.now += 1
        self.forwards.append(list(rows))
        for each in rows:
            each.line += 1
            each.served += 1
            if each.line == each.lines:
                self.ended[each] = self.now
                self.batcher.finish(each)
            elif each.line == each.ends:
                each.lease = None
                self.batcher.switch(each)

    def run(self, most: int = 100_000) -> None:
        for _ in range(most):
            if self.turn() is None:
                return
        raise AssertionError("the simulation does not end")

    def ordered(self, turns: int) -> int:
        """How many rows the batcher compares in so many turns."""
        touched, original = 0, Queue.order

        def counting(queue: Queue, each: Row, now: float) -> Any:
            nonlocal touched
            touched += 1
            return original(queue, each, now)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Queue, "order", counting)
            for _ in range(turns):
                self.turn()
        return touched


def fixed(passes: int, *, slots: int = 64, rate: float = 1.0, encode: int = 8) -> Callable[[Key], Caps]:
    return lambda key: Caps(passes, encode, 4, slots, rate)
