"""Tenants in the engine, on a clock that only the network moves: shares, weights, deadlines that cannot be met."""

from __future__ import annotations

import pytest
import torch

from app.engine.queue import QUANTUM
from app.errors import DeadlineExceeded
from app.families.base import Conditions
from tests.parts.engine import Bench, FakeCosts, FakeFamily, FakePool, card, request
from tests.parts.waiting import Clock

RATE = 0.01
"""Seconds a pass; the widest forward has four."""


class TimedFamily(FakeFamily):
    """A network whose passes take RATE seconds of a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(card())
        self.clock = clock

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, None]:
        self.clock.now += len(x) * RATE
        out, _ = super().denoise(x, t, conditions)
        return out, None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bench(clock: Clock) -> Bench:
    return Bench(FakePool(TimedFamily(clock)), costs=FakeCosts(passes=4, rate=RATE), clock=clock)


def submit(bench: Bench, tenant: str, count: int, weight: float = 1.0, steps: int = 8) -> None:
    for number in range(count):
        bench.engine.submit(request(f"{tenant}-{number}", tenant=tenant, weight=weight, steps=steps))


def images(bench: Bench, tenant: str) -> int:
    return sum(name.startswith(f"{tenant}-") for name, _ in bench.results)


def test_behind_a_thousand_rows_of_another_a_request_is_served_within_its_share(bench: Bench, clock: Clock) -> None:
    submit(bench, "flood", 1_000, steps=4)
    bench.turn(100)
    arrived = clock.now
    submit(bench, "small", 1, steps=20)
    while not images(bench, "small"):
        bench.turn()
    own = 20 * 2 * RATE
    assert clock.now - arrived <= QUANTUM + 2 * own + 4 * RATE
    assert images(bench, "flood") < 100


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_images_go_by_weight_while_both_have_work(bench: Bench, clock: Clock, weight: float) -> None:
    submit(bench, "heavy", 300, weight)
    submit(bench, "light", 300)
    while clock.now < 15 * QUANTUM:
        bench.turn()
    assert images(bench, "heavy") / images(bench, "light") == pytest.approx(weight, rel=0.15)


def test_nobody_starves_and_all_is_answered(bench: Bench) -> None:
    for number, tenant in enumerate("abcd"):
        submit(bench, tenant, 10, weight=10.0**-number, steps=3 + number)
    bench.run()
    assert {tenant: images(bench, tenant) for tenant in "abcd"} == dict.fromkeys("abcd", 10)
    assert bench.engine.batcher.shares.credits.keys() <= set("abcd")


def test_a_deadline_that_cannot_be_met_fails_before_the_row_takes_a_slot(bench: Bench, clock: Clock) -> None:
    submit(bench, "busy", 40, steps=4)
    bench.turn(5)
    own = 20 * 2 * RATE
    deadline = clock.now + own + 5 * RATE
    bench.engine.submit(request("late", steps=20, deadline=deadline))
    bench.engine.submit(request("never", steps=20, deadline=clock.now + own / 2))
    bench.engine.submit(request("good", steps=20, deadline=clock.now + 100))
    bench.turn()
    assert list(bench.failures) == ["never"]
    while "late" not in bench.failures:
        bench.turn()
    assert isinstance(bench.failures["late"].error, DeadlineExceeded)
    assert clock.now < deadline, "told while its client still waits"
    assert bench.run().failures.keys() == {"never", "late"}
    assert ("good", 0) in bench.results
