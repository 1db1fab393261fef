"""Curve: what a forward of one key costs by its passes, learned from the forwards that run."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from statistics import median_low

NEAR = 1.10
"""A width is wide enough when its cost per pass is within this factor of the best known one."""

WIDEST = 64
"""Passes of the widest forward that is measured or tried."""

KEPT = 9
"""Samples of one doubling that the median is taken of."""

TRIES = 6
"""Samples from real forwards that a doubling must have before it is tried seldom only. A trial gives two: beside the
forward before it and beside the one after it."""

PATIENCE = 64
"""Forwards before a doubling that did not pay is tried again; twice as many after each time."""

CLOSE = 2.0
"""Seconds between two forwards whose times are compared, or CLOSE_FORWARDS times what they take, if that is longer."""
CLOSE_FORWARDS = 8

PACE = 0.05
"""How far the pace moves towards what a forward has just taken."""

OUTLIER = 4.0
"""A forward that takes so many times its estimate, or more, moves the pace as if it took that."""

NO_ROOM = 4.0
"""The sample of a doubling whose wider forward did not fit in memory: it is run in halves, and does not pay."""


class Curve:
    """Seconds of a forward: a pace, which follows the load of the machine, times a shape, which does not.

    The shape is one number for each doubling of the passes: how many times as long the wider forward takes, as the
    median of the last KEPT samples. A sample compares two forwards that ran close together, so that a busy neighbour
    slows both and says nothing about the width. The first sample of each doubling is from the measured profile, which
    may be from a bad moment or another day, and counts as one.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """seconds: of a forward by its passes, at least one."""
        self._base = min(seconds)
        self._pace = seconds[self._base]
        places = range(math.floor(math.log2(max(WIDEST, self._base) / self._base)))
        self._growth: list[deque[float]] = [deque(maxlen=KEPT) for _ in places]
        for place in places:
            if {self._width(place), self._width(place + 1)} <= seconds.keys():
                self._growth[place].append(max(1.0, seconds[self._width(place + 1)] / seconds[self._width(place)]))
        self._tried = [0 for _ in places]
        self._warm: set[int] = set()
        self._last, self._ended, self._took = -1, -math.inf, 0.0
        self._since, self._patience = 0, PATIENCE
        self.cap = self._find_cap()

    @property
    def widths(self) -> dict[int, float]:
        """Seconds of a forward at each doubling of the least width that is known, as a profile on disk has them."""
        known = max((place + 1 for place, samples in enumerate(self._growth) if samples), default=0)
        return {self._width(place): self.cost(self._width(place)) for place in range(known + 1)}

    def cost(self, passes: int) -> float:
        """Seconds of a forward of so many passes; beyond the known widths the cost of a pass stays as it is there."""
        place = math.log2(passes / self._base)
        whole = max(0, min(math.floor(place), len(self._growth)))
        shape = math.prod(self._step(doubling) for doubling in range(whole))
        return float(self._pace * shape * (self._step(whole) if place > 0 else 2.0) ** (place - whole))

    def trial(self) -> int:
        """Passes of a wider forward that is worth a try now, when rows nearly fill it; 0 when none is.

        It is twice as wide as the last one, to be compared with that: as the cap, or as a single row that is wider than
        the cap where nothing was learned of that doubling yet. A width that is known from a profile only is tried at
        once; one that did not pay after PATIENCE forwards, then after twice as many, and so on.
        """
        place, cap = self._last, self._place(self.cap)
        if not cap <= place < len(self._growth) or (place > cap and self._tried[place - 1]):
            return 0
        due = self._tried[place] < TRIES or self._since >= self._patience
        return self._width(place + 1) if due else 0

    def learn(self, passes: int, seconds: float, now: float) -> bool:
        """A forward of so many passes took `seconds` and ended at `now`, in seconds; whether the cap is another now.

        The first of each width says nothing: libraries prepare kernels for a shape when they first see it.
        """
        self._since += 1
        if passes not in self._warm:
            self._warm.add(passes)
            return False
        place, expected = self._place(passes), self.cost(passes)
        between = max(0, math.floor(math.log2(passes / self._base)))
        self._pace *= 1 + PACE * (min(seconds / expected, OUTLIER) - 1)
        here = seconds * (self._width(place) / passes) ** math.log2(min(2.0, self._step(between)))
        if abs(place - self._last) == 1 and now - self._ended <= max(CLOSE, CLOSE_FORWARDS * (here + self._took)):
            self._compare(min(place, self._last), here / self._took if place > self._last else self._took / here)
        self._last, self._ended, self._took = place, now, here
        before, self.cap = self.cap, self._find_cap()
        if self.cap != before:
            self._since, self._patience = 0, PATIENCE
        return self.cap != before

    def refuse(self, passes: int) -> None:
        """A forward of so many passes did not fit in memory: a trial of it counts as made, and did not pay."""
        self._compare(self._place(passes) - 1, NO_ROOM)

    def _compare(self, place: int, growth: float) -> None:
        """One more sample of a doubling."""
        if not 0 <= place < len(self._growth):
            return
        self._growth[place].append(max(1.0, growth))
        self._tried[place] += 1
        if place >= self._place(self.cap) and self._tried[place] > TRIES and self._since >= self._patience:
            self._since, self._patience = 0, 2 * self._patience

    def _find_cap(self) -> int:
        """The least known width whose cost per pass is within NEAR of the best known one."""
        each = {passes: seconds / passes for passes, seconds in self.widths.items()}
        return min(passes for passes, cost in each.items() if cost <= NEAR * min(each.values()))

    def _step(self, place: int) -> float:
        """How many times as long the doubling at `place` takes; 2, so that a pass costs the same, beyond what is known.

        One that no real forward has shown takes no more than the next that one has: width pays ever less.
        """
        own = self._growth[place : place + 1]
        known = [median_low(samples) for samples in own if samples]
        if own and not self._tried[place]:
            later = zip(self._growth[place:], self._tried[place:], strict=True)
            known += itertools.islice((median_low(samples) for samples, tried in later if tried), 1)
        return min(known, default=2.0)

    def _width(self, place: int) -> int:
        return self._base << place

    def _place(self, passes: int) -> int:
        return round(math.log2(passes / self._base))
