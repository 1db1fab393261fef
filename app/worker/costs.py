"""Costs: what an image is estimated to cost, in seconds of one device, from measured rates and past work.

Knows nothing of requests, queues or processes.
"""

from __future__ import annotations

import math
from bisect import bisect, insort

from app.cards.card import parse_size
from app.report import ModelState, Phase, Tick

DEFAULT_RATE = 0.05
"""Seconds a pass until a model has been measured: about SD3.5-large at 1024 px on one large GPU."""

PACE = 0.1
"""How far an average moves towards what was just measured."""

FULL = 0.75
"""Forwards of at least this part of the key's cap teach what a pass takes: a narrow one costs more a pass."""

OUTLIER = 4.0
"""A measurement over so many times the average counts as that: the first decode after a load also loads."""


class Costs:
    """What one device takes. Kept when its process dies: the next one has the same device and the same files.

    An encode and a decode count as one pass each until they have been seen. The engine tells the rate of an idle
    device; what a shared or a hot one takes is learned from the full forwards, which is what a queue is made of.
    Sizes of the same area have the same number of tokens, and one rate.
    """

    def __init__(self) -> None:
        self._rates: dict[str, dict[int, float]] = {}
        self._areas: dict[str, list[int]] = {}  # of the rates, in order
        self._seen: dict[tuple[str, Phase, int, int], float] = {}

    def hear(self, report: ModelState | Tick) -> None:
        """Learn from a report of the engine."""
        if isinstance(report, ModelState):
            for size, rate in report.rates.items():
                self._measured(report.model, math.prod(parse_size(size)), rate)
        elif report.phase == "denoise":
            self._hear_forward(report)
        elif report.rows and report.width:
            place = (report.model, report.phase, report.width, report.height)
            known = self._seen.get(place, self.rate(report.model, report.width, report.height))
            self._seen[place] = _nearer(known, report.seconds / report.rows)

    def _measured(self, model: str, area: int, rate: float) -> None:
        rates = self._rates.setdefault(model, {})
        if area not in rates:
            insort(self._areas.setdefault(model, []), area)
        rates[area] = rate

    def _hear_forward(self, tick: Tick) -> None:
        area, passes = tick.width * tick.height, tick.passes - tick.padding
        rates = self._rates.get(tick.model, {})
        if area in rates and 0 < tick.cap * FULL <= passes:
            rates[area] = _nearer(rates[area], tick.seconds / passes)

    def measured(self, model: str) -> bool:
        """Whether the estimates for this model are more than a guess."""
        return bool(self._rates.get(model))

    def image(self, model: str, width: int, height: int, passes: int) -> float:
        """Seconds of one image that goes through the network `passes` times."""
        rate = self.rate(model, width, height)
        around = (self._seen.get((model, phase, width, height), rate) for phase in ("encode", "decode"))
        return passes * rate + sum(around)

    def rate(self, model: str, width: int, height: int) -> float:
        """Seconds a pass at width x height pixels: measured, or scaled by area from the nearest size, or a guess."""
        rates = self._rates.get(model)
        if not rates:
            return DEFAULT_RATE
        area, areas = width * height, self._areas[model]
        above = bisect(areas, area)
        nearest = min(areas[max(0, above - 1) : above + 1], key=lambda known: abs(known - area))
        return rates[nearest] * area / nearest


def _nearer(known: float, taken: float) -> float:
    return known + PACE * (min(taken, OUTLIER * known) - known)
