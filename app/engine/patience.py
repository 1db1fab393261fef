"""Patience: how long a work may take before it counts as hung, by what such works took."""

from __future__ import annotations

import math
from collections.abc import Callable

from app.engine.row import Work
from app.pool.pool import Pool
from app.report import Announce, Report
from app.request import Key

FACTOR = 10.0
"""Work counts as hung at so many times its estimate, but not before LEAST seconds and at MOST seconds at the latest."""

LEAST = 10.0
MOST = 30.0

LONG = 5.0
"""Work with an estimate over MOST / LONG seconds may take so many times its estimate."""

FIRST_AREA = 256**2
FIRST_ON_GPU = 120.0
COMPILING = 600.0
IDLE = 30.0

FADING = 0.98
"""An estimate that is too long shrinks by this at each work that takes less."""


class Patience:
    """Announces each work with the seconds that it may take.

    An estimate is the longest that such a work took in this process, never a number from a file. On a CPU LEAST and
    MOST are for each gigabyte of the model's weights, and before there is an estimate, MOST for each 256 x 256 pixels
    too. A GPU, whose kernels are loaded at first use, has FIRST_ON_GPU seconds, those that compile COMPILING.
    """

    def __init__(self, pool: Pool, emit: Callable[[Report], None], clock: Callable[[], float], compiled: bool) -> None:
        self._pool, self._emit, self._clock, self._compiled = pool, emit, clock, compiled
        self._plain = pool.device.type == "cpu" and not compiled
        self._longest: dict[tuple[Key, str], tuple[float, int]] = {}
        self._announced, self._announced_at = Announce("start", 0.0), 0.0

    def forget(self, model: str) -> None:
        """Drop the estimates of a model that was loaded again: its weights may have to come from the disk once more."""
        self._longest = {at: longest for at, longest in self._longest.items() if at[0].model != model}

    def idle(self) -> None:
        """Announce that there is nothing to do. Call it again and again."""
        self._announce("idle", IDLE)

    def begin(self, work: Work) -> None:
        """Announce a work. The next width of a profile is twice the last, and networks compile meanwhile."""
        compiling = self._compiled and work.phase == "profile"
        self._announce(work.phase, COMPILING if compiling else self._limit(work.key, work.phase, work.passes or 2))

    def end(self, work: Work) -> None:
        """Learn from a work; one that failed, or found all of its texts encoded, says nothing of the next."""
        known = work.text_hits > 0
        if not (work.failed or work.error or work.idle or (known and not work.text_misses)):
            least = known or work.phase == "profile"
            self._learn(work.key, work.phase, 1 if least else work.passes, work.seconds)

    def _limit(self, key: Key, phase: str, size: int) -> float:
        longest = self._longest.get((key, phase))
        if longest is None and not self._plain:
            return COMPILING if self._compiled else FIRST_ON_GPU
        # Gigabytes of weights where the system may have dropped them from memory.
        large = max(1.0, self._pool.size(key.model) / 1e9) if self._plain else 1.0
        if longest is None:
            return math.ceil(MOST * large * max(1.0, size * key.width * key.height / FIRST_AREA))
        estimate = longest[0] * max(1.0, size / longest[1])
        least = LEAST * large if self._plain else MOST
        return math.ceil(max(LONG * estimate, min(MOST * large, max(least, FACTOR * estimate))))

    def _learn(self, key: Key, phase: str, size: int, seconds: float) -> None:
        longest, widest = self._longest.get((key, phase), (0.0, size))
        faded = FADING * longest
        self._longest[key, phase] = (seconds, size) if seconds >= faded else (faded, widest)

    def _announce(self, phase: str, seconds: float) -> None:
        """Emit a change, or the same again when a third of it is gone; a Tick is a sign of life by itself."""
        fresh, now = Announce(phase, seconds), self._clock()
        if fresh != self._announced or now - self._announced_at >= seconds / 3:
            self._announced, self._announced_at = fresh, now
            self._emit(fresh)
