"""How long the engine lets a work take: ten times its estimate, within bounds, and longer for what cannot be short."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.engine.row import COMPILING, FIRST_ON_GPU, LEAST, MOST, Patience, Work
from app.errors import EngineError
from app.report import Announce, Phase, Report
from app.request import Key
from tests.parts.engine import Bench, FakeFamily, FakePool, card, request
from tests.parts.simulation import row

SMALL, LARGE = Key("small", 64, 64, 16), Key("large", 1024, 1024, 16)


class Watched:
    """A Patience whose announcements are looked at; every one is new, because a minute passes between two."""

    def __init__(self, device: str = "cpu", compiled: bool = False) -> None:
        sizes = {"small": 1_000_000, "large": 8_000_000_000}
        pool: Any = SimpleNamespace(device=torch.device(device), size=sizes.__getitem__)
        self.told: list[Report] = []
        clock = itertools.count(0, 60)
        self.patience = Patience(pool, self.told.append, lambda: float(next(clock)), compiled)

    @property
    def last(self) -> float:
        assert isinstance(self.told[-1], Announce)
        return self.told[-1].seconds

    def work(self, rows: int = 1, phase: Any = "denoise", key: Key = SMALL) -> float:
        """Seconds that such a work would have now."""
        self.patience.begin(Work(phase, key, [row(4) for _ in range(rows)]))
        return self.last

    def ran(self, seconds: float, rows: int = 1, phase: Any = "denoise", key: Key = SMALL, **outcome: Any) -> None:
        work = Work(phase, key, [row(4) for _ in range(rows)], seconds=seconds, **outcome)
        self.patience.begin(work)
        self.patience.end(work)


@pytest.mark.parametrize(
    ("took", "limit"), [(0.001, LEAST), (1.0, LEAST), (2.0, 20.0), (3.0, MOST), (5.0, MOST), (20.0, 100.0)]
)
@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_ten_times_what_it_took_within_bounds_and_five_times_what_takes_long(
    phase: Phase, took: float, limit: float
) -> None:
    watched = Watched()
    watched.ran(took, phase=phase)
    assert watched.work(phase=phase) == limit


def test_before_anything_is_known_half_a_minute_or_what_size_and_weights_may_need() -> None:
    assert Watched().work() == MOST
    assert Watched().work(16) == MOST, "sixteen images of 64 px are one of 256"
    assert Watched().work(key=LARGE) == MOST * 8 * 16
    assert Watched("cuda").work(key=LARGE) == FIRST_ON_GPU
    assert Watched(compiled=True).work() == COMPILING


def test_where_kernels_are_loaded_or_compiled_late_nothing_has_less_than_half_a_minute() -> None:
    for watched in (Watched("cuda"), Watched(compiled=True)):
        watched.ran(0.001)
        assert watched.work() == MOST


def test_a_large_model_on_a_cpu_may_read_its_weights_again() -> None:
    watched = Watched()
    watched.ran(0.1, key=LARGE)
    assert watched.work(key=LARGE) == 8 * LEAST
    watched.ran(20.0, key=LARGE)
    assert watched.work(key=LARGE) == 200.0
    gpu = Watched("cuda")
    gpu.ran(0.1, key=LARGE)
    assert gpu.work(key=LARGE) == MOST, "there they are on the device"


def test_a_model_that_was_loaded_anew_is_not_known() -> None:
    watched = Watched()
    watched.ran(0.1)
    watched.ran(0.1, key=LARGE)
    watched.patience.forget("small")
    assert watched.work() == MOST and watched.work(key=LARGE) == 8 * LEAST


def test_a_wider_work_has_more_and_a_narrower_one_not_less() -> None:
    watched = Watched()
    watched.ran(0.5, rows=4)
    assert watched.work(16) == 20.0
    watched.ran(2.0, rows=16)
    assert watched.work(1) == 20.0


def test_one_slow_work_is_forgotten_in_time() -> None:
    watched = Watched()
    watched.ran(20.0)
    for _ in range(400):
        watched.ran(0.1)
    assert watched.work() == LEAST


def test_what_did_nothing_says_nothing() -> None:
    """Else a text encoder would have no time after prompts that were encoded before."""
    watched = Watched()
    failed = [(row(1), EngineError("broken"))]
    for outcome in ({"idle": True}, {"failed": failed}, {"text_hits": 3}):
        watched.ran(0.0, phase="encode", **outcome)
    assert watched.work(phase="encode") == MOST
    watched.ran(2.0, rows=8, phase="encode", text_hits=7, text_misses=1)
    assert watched.work(8, phase="encode") == 80.0


def test_the_next_width_of_a_profile_has_ten_times_twice_the_last() -> None:
    watched = Watched()
    assert watched.work(0, "profile") == MOST
    watched.ran(1.2, 0, "profile")
    assert watched.work(0, "profile") == 24.0
    watched.ran(60.0, 0, "profile", error=EngineError("broken"))
    assert watched.work(0, "profile") == 24.0, "one that failed says nothing"
    compiled = Watched(compiled=True)
    compiled.ran(0.1, 0, "profile")
    assert compiled.work(0, "profile") == COMPILING


def test_the_engine_announces_each_phase_before_it_begins_it() -> None:
    bench = Bench(FakePool(FakeFamily(card())))
    bench.run([request("a", steps=3)])
    phases = [each.phase for each in bench.reports if isinstance(each, Announce)]
    assert list(dict.fromkeys(phases)) == ["profile", "encode", "denoise", "decode"]
    assert all(LEAST <= each.seconds <= MOST for each in bench.of(Announce))
