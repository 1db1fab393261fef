"""Cores: how many threads a forward on the CPU computes with, which is one less for each core that others keep busy."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from app.pool.threads import use_threads

LOOK = 0.2
"""Seconds from one look at the other processes to the next, and the span that a look is about."""

SLACK = 0.4
"""Cores that others may use in all before a thread is given up: where they use less, all threads are still faster."""

_STAT = Path("/proc/stat")


class Cores:
    """Keeps the calling thread's number of torch threads at what other processes leave free.

    OpenMP's threads spin where they wait for each other. If one of them has to share its core with another process, all
    of them spin until it has had its turn: on 2 cores an image took 4 times as long beside one busy process, and with
    one thread less it takes 1.3 times as long (`python -m tests.bench.neighbours`). Processes with a niceness above 0
    do not count while this one has none, because they give way by themselves.

    most: the threads where nobody else computes. clock: seconds. used: processor seconds of this process.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
        stat: Path = _STAT,
    ) -> None:
        self.threads = self._most = most
        self._clock, self._used, self._stat = clock, used, stat
        self._last = self._look()

    def adapt(self) -> None:
        """Look at the other processes, if the last look is long enough ago, and set the number of threads."""
        if self._last is None or self._clock() - self._last[0] < LOOK:
            return
        before, self._last = self._last, self._look()
        if self._last is None:
            return
        seconds, all_used, own = (now - then for now, then in zip(self._last, before, strict=True))
        threads = self._left((all_used - own) / seconds)
        if threads != self.threads:
            self.threads = threads
            use_threads(threads)

    def _left(self, others: float) -> int:
        free = len(os.sched_getaffinity(0)) - max(0, math.ceil(others - SLACK))
        return max(1, min(self._most, free))

    def _look(self) -> tuple[float, float, float] | None:
        """Seconds on the clock, of all processes on our cores, and of this one; None where the system does not say."""
        try:
            lines = self._stat.read_text().splitlines()
            ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            niced = os.nice(0) > 0
            busy = sum(_ticks(line, niced) for line in lines if line.partition(" ")[0] in ours)
            return self._clock(), busy / os.sysconf("SC_CLK_TCK"), self._used()
        except (OSError, AttributeError, ValueError, IndexError):
            return None


def _ticks(line: str, niced: bool) -> int:
    """A core's busy time in a line of /proc/stat: user, system, interrupts, and what the hypervisor gave to others.

    niced: with the time of processes that have a niceness above 0.
    """
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return user + system + irq + softirq + steal + (nice if niced else 0)
