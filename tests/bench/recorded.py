"""Recorded traces: the same requests at the same times for every server and every day that is compared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import count, cycle, islice, takewhile
from pathlib import Path
from typing import Any

from app.bench.serve import CLASSES, Arrival, Mix, arrivals
from app.cards.card import Card
from app.errors import InvalidValue


@dataclass(frozen=True)
class Trace:
    """facts: name, seconds, rate, seed and classes, as they were recorded. Arrivals are in order of time."""

    facts: dict[str, Any]
    arrivals: tuple[Arrival, ...]

    @property
    def rate(self) -> float:
        """Mean requests a second."""
        return len(self.arrivals) / float(self.facts["seconds"])

    def of(self, model: str) -> Trace:
        """The same requests for another model."""
        return replace(self, arrivals=tuple(one._replace(body=one.body | {"model": model}) for one in self.arrivals))

    def at_rate(self, rate: float, seconds: float) -> list[Arrival]:
        """Arrivals of the first `seconds`, all times scaled to this mean rate; the trace repeats when it ends.

        Raises InvalidValue: there is no request in that time.
        """
        length, scale = float(self.facts["seconds"]), self.rate / rate
        repeated = (one._replace(at=scale * (turn * length + one.at)) for turn in count() for one in self.arrivals)
        found = list(takewhile(lambda one: one.at < seconds, repeated))
        if not found:
            raise InvalidValue(f"seconds: there is no request in {seconds:g} s", param="seconds")
        return found

    def first(self, number: int) -> list[Arrival]:
        """This many arrivals in order, from the start again when the trace ends."""
        return list(islice(cycle(self.arrivals), number))

    def kinds(self) -> list[Arrival]:
        """One arrival of every kind of work."""
        return list({one.work: one for one in reversed(self.arrivals)}.values())[::-1]

    def write(self, file: Path) -> None:
        """Write a line of facts, then a line for each request. Raises OSError."""
        lines = [self.facts, *({"at": at, "class": kind, "body": body} for at, kind, body in self.arrivals)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def record(card: Card, mix: Mix, rate: float, seconds: float, seed: int) -> Trace:
    """Draw the arrivals of some seconds. Raises InvalidValue: there is no request in that time."""
    found = tuple(takewhile(lambda one: one.at < seconds, arrivals(card, mix, rate, seed)))
    if not found:
        raise InvalidValue(f"there is no request in {seconds:g} s at {rate:g} requests a second", param="seconds")
    facts = {"name": mix, "seconds": seconds, "rate": rate, "unit": "requests/s", "seed": seed, "classes": CLASSES}
    return Trace(facts, found)


def read(file: Path) -> Trace:
    """Read the trace of a file. Raises OSError; InvalidValue names the first line that does not belong to a trace."""
    facts: dict[str, Any] = {}
    found: list[Arrival] = []
    for number, line in enumerate(file.read_bytes().splitlines() or [b""], 1):
        try:
            told = json.loads(line)
            at = float(told["seconds" if number == 1 else "at"])
            if not 0 <= at < math.inf:
                raise ValueError("at")
            if number > 1:
                found.append(Arrival(at, str(told["class"]), dict(told["body"])))
            facts = facts or told
        except (ValueError, LookupError, TypeError) as error:
            raise InvalidValue(f"{file}, line {number}: not a line of a trace", param="trace") from error
    if not found:
        raise InvalidValue(f"{file}: there is no request in this trace", param="trace")
    return Trace(facts, tuple(sorted(found, key=lambda one: one.at)))
