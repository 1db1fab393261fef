"""The engine's own loop while there is nothing to do: its silence has an end that the front can hold it to."""

from __future__ import annotations

import itertools
import queue
import threading

from app.engine.engine import Engine
from app.report import Announce, Report
from app.settings import Settings
from tests.parts.engine import NOWHERE, FakeCosts, FakeFamily, FakePool, card


def test_an_idle_engine_says_so_again_well_within_what_it_announced() -> None:
    """On a clock that goes on by a second each time it is read."""
    seconds = itertools.count()
    told: queue.SimpleQueue[tuple[Report, int]] = queue.SimpleQueue()
    engine = Engine(
        FakePool(FakeFamily(card())),
        Settings(cache=NOWHERE),
        lambda report: told.put((report, next(seconds))),
        costs=FakeCosts(),
        clock=lambda: float(next(seconds)),
    )
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        heard = [told.get(timeout=30) for _ in range(3)]
    finally:
        engine.stop()
        thread.join(30)
    assert [report for report, _ in heard] == [Announce("idle", 30.0)] * 3
    assert all(10 <= later - sooner < 30 for (_, sooner), (_, later) in itertools.pairwise(heard))
