"""Shares of the device between tenants: by weight, at work always, nothing saved up, nobody starved."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.queue import DEBT, FairShares
from app.engine.row import Caps
from app.request import Key
from tests.parts.simulation import OTHER, Simulation, fixed, row


def service(simulation: Simulation, since: int = 0) -> Counter[str]:
    """Seconds of the device by tenant, a forward shared by passes."""
    seconds: Counter[str] = Counter()
    for rows in simulation.forwards[since:]:
        for each in rows:
            seconds[each.request.delivery.tenant] += each.passes / sum(other.passes for other in rows)  # type: ignore[assignment]
    return seconds


def refill(simulation: Simulation, tenant: str, weight: float = 1.0, steps: int = 6) -> None:
    simulation.add(*(row(steps, tenant=tenant, weight=weight) for _ in range(20)))


def test_a_flood_of_a_thousand_rows_does_not_stand_before_one_request() -> None:
    """Though every row of the flood is shorter, and by then older than its age limit."""
    simulation = Simulation(fixed(4, slots=16))
    simulation.add(*(row(5, tenant="flood") for _ in range(1_000)))
    for _ in range(200):
        simulation.turn()
    small = row(20, tenant="small")
    simulation.add(small)
    arrived = simulation.now
    while small not in simulation.ended:
        simulation.turn()
    assert simulation.ended[small] - arrived <= 2 * 20 + 5
    assert service(simulation)["flood"] > 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (1.0, 0.25)])
def test_service_goes_by_weight(weights: tuple[float, float]) -> None:
    simulation = Simulation(fixed(4, slots=20))
    for _ in range(40):
        refill(simulation, "a", weights[0])
        refill(simulation, "b", weights[1], steps=2)
        for _ in range(10):
            simulation.turn()
    seconds = service(simulation, len(simulation.forwards) // 4)
    assert seconds["a"] / seconds["b"] == pytest.approx(weights[0] / weights[1], rel=0.15)


def test_service_goes_by_weight_between_models_too() -> None:
    simulation = Simulation(fixed(4, slots=20))
    simulation.add(*(row(6, tenant="a", weight=2.0) for _ in range(400)))
    simulation.add(*(row(6, tenant="b", key=OTHER) for _ in range(400)))
    for _ in range(600):
        simulation.turn()
    seconds = service(simulation)
    assert seconds["a"] / seconds["b"] == pytest.approx(2.0, rel=0.1)


def test_the_device_is_never_idle_while_anybody_waits() -> None:
    simulation = Simulation(fixed(2))
    simulation.add(*(row(5, tenant=f"t{number % 3}") for number in range(30)))
    while simulation.turn() is not None:
        continue
    assert len(simulation.ended) == 30
    assert len(simulation.forwards) == 30 * 5 / 2


def test_who_was_idle_has_saved_nothing_up() -> None:
    simulation = Simulation(fixed(1))
    refill(simulation, "busy", steps=50)
    simulation.add(row(1, tenant="idle"))
    for _ in range(400):
        simulation.turn()
    before = len(simulation.forwards)
    refill(simulation, "idle", steps=50)
    for _ in range(60):
        simulation.turn()
    seconds = service(simulation, before)
    assert abs(seconds["idle"] - seconds["busy"]) <= 3


def test_who_had_the_device_alone_owes_little_for_it() -> None:
    simulation = Simulation(fixed(1))
    refill(simulation, "early", steps=50)
    for _ in range(300):
        simulation.turn()
    before = len(simulation.forwards)
    refill(simulation, "late", steps=50)
    for _ in range(60):
        simulation.turn()
    seconds = service(simulation, before)
    assert abs(seconds["early"] - seconds["late"]) <= DEBT + 1


def test_a_tenant_whose_model_is_away_neither_holds_up_the_others_nor_saves_up() -> None:
    here = {"model"}
    simulation = Simulation(lambda key: Caps(1, 1, 1, 8, 1.0) if key.model in here else None)
    refill(simulation, "present", steps=50)
    simulation.add(*(row(50, tenant="waiting", key=OTHER) for _ in range(5)))
    for _ in range(100):
        assert simulation.turn() is not None
    here.add("other")
    before = len(simulation.forwards)
    for _ in range(60):
        simulation.turn()
    seconds = service(simulation, before)
    assert abs(seconds["present"] - seconds["waiting"]) <= DEBT + 1


def test_the_last_quarter_of_the_slots_is_open_to_who_holds_less_than_its_share() -> None:
    simulation = Simulation(fixed(4, slots=16))
    for number in range(12):
        simulation.add(row(100 - 2 * number, tenant="first"))
        simulation.turn()
        simulation.turn()
    simulation.add(*(row(150, tenant="first") for _ in range(40)))
    for _ in range(12):
        simulation.turn()
    assert simulation.batcher.running == 12, "alone, it leaves the last quarter free"
    simulation.add(*(row(200, tenant="second") for _ in range(40)))
    for _ in range(12):
        simulation.turn()
    (queue,) = simulation.batcher.queues.values()
    assert Counter(each.request.delivery.tenant for each in queue.started) == {"first": 12, "second": 4}


def test_an_aged_row_without_room_for_its_slots_stops_the_younger_ones_of_other_keys() -> None:
    """Slots for one key at a time: without the hold the stream of the first key never ends."""

    def caps(key: Key) -> Caps:
        others = any(queue.started for other, queue in simulation.batcher.queues.items() if other != key)
        return Caps(2, 2, 2, 0 if others else 8, 1.0)

    simulation = Simulation(caps)
    simulation.add(row(4), row(4))
    simulation.turn()
    large = row(3, key=OTHER)
    simulation.add(large)
    while large not in simulation.ended and simulation.now < 500:
        if simulation.batcher.waiting < 4:
            simulation.add(row(2), row(2))
        simulation.turn()
    assert 8 * 3 < simulation.ended[large] <= 8 * 3 + 4 + 3 + 2


def test_doomed_rows_are_told_before_they_run() -> None:
    simulation = Simulation(fixed(1, rate=1.0))
    simulation.add(row(10))
    late, soon, free = row(5, deadline=12.0), row(5, guided=True, deadline=12.0), row(5)
    simulation.turn()
    simulation.add(late, soon, free)
    assert simulation.batcher.late(2.0) == []
    assert simulation.batcher.late(2.5) == [soon]
    assert simulation.batcher.late(2.5) == [], "each is told once"
    assert simulation.batcher.late(7.5) == [late]
    begun = row(1, deadline=9.0)
    simulation.add(begun)
    while not begun.begun:
        simulation.turn()
    assert simulation.batcher.late(8.9) == [], "one that has begun goes on to its deadline"
    assert simulation.batcher.late(9.1) == [begun]


def test_a_row_that_is_encoded_ahead_is_still_told_that_it_is_doomed() -> None:
    simulation = Simulation(fixed(4, rate=1.0))
    first, ahead = [row(8, guided=True) for _ in range(2)], [row(9, guided=True, deadline=30.0) for _ in range(2)]
    simulation.add(*first, *ahead)
    simulation.turn()
    assert {each.stage for each in ahead} == {"started"} and simulation.batcher.waiting == 0
    assert simulation.batcher.late(11.0) == []
    assert simulation.batcher.late(13.0) == ahead


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 8), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 6),
    st.integers(4, 16),
    st.floats(0.01, 10.0),
)
def test_everybody_is_served_and_no_work_is_lost(
    asked: list[tuple[str, int, bool]], passes: int, slots: int, weight: float
) -> None:
    simulation = Simulation(fixed(passes, slots=slots))
    rows = [row(steps, guided=guided, tenant=name, weight=weight * ord(name)) for name, steps, guided in asked]
    simulation.add(*rows)
    simulation.run()
    assert set(simulation.ended) == set(rows)
    assert Counter(itertools.chain(*simulation.forwards)) == Counter({each: each.lines for each in rows})
    assert not simulation.batcher.queues or simulation.batcher.next(math.inf) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 30.0)), max_size=200))
def test_accounts_stay_within_a_quantum_and_the_debt(charges: list[tuple[str, float]]) -> None:
    shares = FairShares(quantum=0.5)
    weights = {"a": 1.0, "b": 3.0, "c": 0.0}
    for name, weight in weights.items():
        shares.join(name, weight)
    for name, seconds in charges:
        if not any(map(shares.has, weights)):
            shares.begin_round(weights)
            assert any(map(shares.has, weights))
        shares.charge(name, seconds)
        for each in weights:
            quantum = shares.weight(each)
            assert -DEBT * quantum <= shares.credits[each] <= quantum


def test_an_account_ends_with_its_round_when_it_has_no_rows_and_no_debt() -> None:
    shares = FairShares()
    shares.join("gone", 1.0)
    shares.join("here", 1.0)
    shares.leave("gone")
    for _ in range(2):
        shares.charge("gone", 1.5)
        shares.charge("here", 1.0)
        shares.begin_round(["here"])
    assert not shares.has("gone")
    for _ in range(5):
        shares.charge("here", 1.0)
        shares.begin_round(["here"])
    assert list(shares.credits) == ["here"]


def test_a_choice_looks_at_some_of_ten_thousand_rows_of_a_hundred_tenants() -> None:
    """Counted in rows that are ordered, not in time."""
    simulation = Simulation(fixed(4))
    simulation.add(*(row(3, tenant=f"t{number % 100}") for number in range(10_000)))
    simulation.turn()
    assert simulation.ordered(turns=10) <= 2 * 10 * 100
