"""The switch of a row from one model to the next: what the engine, the batcher and the page make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from app.engine.costs import Curve
from app.engine.row import Row, rows_of
from app.engine.step import Slots, Start
from app.errors import Cancelled, CheckpointError, DeadlineExceeded, ModelNotFound, OutOfMemory
from app.report import ModelState, Tick
from app.request import Key, Refiner, Request, SkipGuidance
from tests.engine.test_apart import Page, Watched
from tests.parts.close import SAME, apart, close
from tests.parts.engine import Bench, FakeCosts, FakeFamily, FakePool, Still, card, request
from tests.parts.requests import changed
from tests.parts.simulation import KEY, OTHER, Simulation, fixed, row
from tests.parts.waiting import Clock


@pytest.fixture
def pool() -> FakePool:
    return FakePool(FakeFamily(card()), FakeFamily(card("second", text={"clip": 24, "t5": 16})))


def refined(name: str, switch_at: float = 0.5, **changes: Any) -> Request:
    """8 lines, of which the second model draws the last two."""
    return changed(request(name, **changes), refiner=Refiner("second", switch_at))


def rows(pool: FakePool, asked: Request) -> list[Row]:
    return rows_of(asked, pool.cards, 0.0, iter(range(9)))


def held(bench: Bench, pool: FakePool) -> int:
    """Slots and leases of all rows, and those that wait or run."""
    slots = sum(not one.idle for one in bench.engine.runner.slots.by_key.values())
    return slots + pool.leases + bench.engine.batcher.running + bench.engine.batcher.waiting


def test_a_row_counts_over_all_legs_and_is_of_the_key_of_one(pool: FakePool) -> None:
    asked = refined("a", adapters=(("x", 0.5),))
    (one,) = rows(pool, asked)
    first, second = asked.recipe.key, Key("second", 32, 32, 16)
    assert one.legs == ((first, 6), (second, 2)) and (one.lines, one.total, one.begins, one.ends) == (8, 16, 0, 6)
    assert (one.key, one.kit, one.ahead) == (first, ("fake", ("x",)), [(first, 12), (second, 4)])
    assert one.place[-1] == -1
    one.line, one.stage = 6, "started"
    assert (one.ahead, one.place[-1]) == ([(first, 0), (second, 4)], 6)
    one.switch()
    assert (one.key, one.kit, one.begins, one.ends) == (second, ("second", ()), 6, 8)
    assert (one.stage, one.needs, one.remaining, one.ahead) == ("waiting", "encode", 4, [(second, 4)])
    assert one.place[-1] == 6, "what has begun is not as what has not"


def test_adapters_are_of_the_first_model_alone(pool: FakePool) -> None:
    """Also where the refiner draws all lines: those that run of a late start."""
    asked = changed(refined("a", adapters=(("x", 0.5),)), strength=0.25)
    (one,) = rows(pool, asked)
    assert one.legs == ((Key("second", 32, 32, 16), 2),) and one.adapters == ()


def test_between_its_legs_it_has_no_memory_of_either_model(pool: FakePool) -> None:
    pool.present = {"fake"}
    bench = Bench(pool).run([refined("a"), refined("b", steps=4)])
    assert len(bench.forwards) == 6 and not bench.results and pool.leases == 0
    assert all(slots.idle for slots in bench.engine.runner.slots.by_key.values())
    assert (bench.engine.batcher.running, bench.engine.batcher.waiting) == (0, 2)
    assert [one.request.id for one in bench.engine.batcher.heads()] == ["a"]
    bench.engine.cancel("b")
    bench.turn()
    assert isinstance(bench.failures["b"].error, Cancelled) and bench.engine.batcher.waiting == 1
    pool.present.add("second")
    bench.run()
    assert list(bench.results) == [("a", 0)] and held(bench, pool) == 0


@pytest.mark.parametrize("share", [(0.0, 0.6), (0.3, 0.9), (0.8, 1.0)])
def test_skip_layer_guidance_acts_on_lines_of_all_legs(pool: FakePool, share: tuple[float, float]) -> None:
    """Two models that compute the same draw what one draws, however the lines that skip lie about the switch."""
    plain, skip = request("x", steps=10), SkipGuidance(2.0, *share)
    asked = [plain, changed(plain, skip=skip), changed(refined("x", steps=10), skip=skip)]
    without, whole, both = (Bench(pool).run([one]).results["x", 0].latents for one in asked)
    close(both, whole, SAME)
    apart(without, whole, SAME)


@pytest.mark.parametrize("switch_at", [0.2, 0.8])
def test_where_the_shift_depends_on_the_size_the_legs_do_not(switch_at: float) -> None:
    """What counts a row's lines knows no number of tokens; what compiles its tables does."""
    dynamic = {"base_tokens": 1, "max_tokens": 17, "base": 0.0, "max": 3.0}
    facts = {"schedule": {"kind": "flow", "spacing": "flux", "dynamic_shift": dynamic}}
    pool = FakePool(*(FakeFamily(card(name, **facts)) for name in ("fake", "second")))
    asked, static = request("x", steps=10, width=64, height=64), FakePool(FakeFamily(card()))
    whole, other = (Bench(one).run([asked]).results["x", 0].latents for one in (pool, static))
    bench = Bench(pool).run([changed(asked, refiner=Refiner("second", switch_at))])
    assert {tick.model for tick in bench.forwards} == {"fake", "second"} and len(bench.forwards) == 10
    close(bench.results["x", 0].latents, whole, SAME)
    apart(other, whole, SAME)


def test_a_switch_without_memory_for_the_copies_fails_its_request_alone(
    pool: FakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which another row comes to the switch with it."""
    whole, start, full = Bench(pool).run([refined("good")]).results["good", 0].latents, Slots.start, [True]

    def copies(slots: Slots, slot: int) -> Start:
        if full:
            full.pop()
            raise torch.OutOfMemoryError("no room")
        return start(slots, slot)

    monkeypatch.setattr(Slots, "start", copies)
    bad = refined("bad")
    bench = Bench(pool).run([replace(bad, images=bad.images * 2), refined("good")])
    assert {name: type(one.error) for name, one in bench.failures.items()} == {"bad": OutOfMemory}
    assert held(bench, pool) == 0
    close(bench.results["good", 0].latents, whole, SAME)


def test_without_either_model_there_is_an_error_that_names_it(pool: FakePool) -> None:
    bench = Bench(pool).run([changed(refined("a"), refiner=Refiner("none", 0.5)), refined("b", model="none")])
    errors = {name: one.error for name, one in bench.failures.items()}
    assert all(isinstance(one, ModelNotFound) for one in errors.values())
    assert {name: one.param for name, one in errors.items()} == {"a": "refiner", "b": "model"}


@pytest.mark.parametrize("when", ["before", "waiting", "first leg", "between"])
def test_a_second_model_that_fails_takes_its_requests(pool: FakePool, when: str) -> None:
    """At once where that is known."""
    bench, turns = Bench(pool), {"before": 0, "waiting": 0, "first leg": 4, "between": 100}[when]

    def fail() -> None:
        pool.present.discard("second")
        pool.errors["second"] = CheckpointError("truncated")
        pool.states = [ModelState("second", "failed", "truncated")]

    if when == "before":
        fail()
        bench.run()
    pool.present.discard("second")
    for one in (refined("refined"), request("plain", steps=12)):
        bench.engine.submit(one)
    if when != "before":
        bench.turn(turns)
        assert not bench.failures
        fail()
    bench.run()
    assert {name: one.error.message for name, one in bench.failures.items()} == {"refined": "truncated"}
    assert list(bench.results) == [("plain", 0)] and held(bench, pool) == 0
    assert when != "before" or len(bench.forwards) == 12


def test_a_first_model_that_fails_spares_rows_that_have_left_it(pool: FakePool) -> None:
    pool.present = {"fake"}
    bench = Bench(pool).run([refined("past")])
    bench.engine.submit(refined("before"))
    bench.turn(2)
    pool.errors["fake"] = CheckpointError("truncated")
    pool.states = [ModelState("fake", "failed", "truncated")]
    pool.present = {"fake", "second"}
    bench.run()
    assert list(bench.failures) == ["before"] and list(bench.results) == [("past", 0)] and held(bench, pool) == 0


class Picky(FakeCosts):
    """The second model cannot be measured at this size."""

    def stored(self, family: Any, key: Key) -> Curve | None:
        return None if key.model == "second" else super().stored(family, key)

    def measure(self, family: object, key: Key) -> None:
        raise torch.OutOfMemoryError("no room")


def test_a_key_that_cannot_be_measured_fails_rows_that_come_to_it_later_too(pool: FakePool) -> None:
    bench = Bench(pool, costs=Picky())
    for one in (refined("first", steps=4), refined("second", steps=40), request("plain", steps=20)):
        bench.engine.submit(one)
    bench.run()
    assert {name: type(one.error) for name, one in bench.failures.items()} == dict.fromkeys(
        ("first", "second"), OutOfMemory
    )
    assert list(bench.results) == [("plain", 0)] and held(bench, pool) == 0
    assert sum(tick.rows > 0 for tick in bench.forwards) == 20, "none of the second model"


@pytest.mark.parametrize("model", ["fake", "second"])
def test_an_unload_waits_for_all_legs(pool: FakePool, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    gone: list[str] = []
    monkeypatch.setattr(pool, "unload", gone.append, raising=False)
    bench = Bench(pool)
    bench.engine.submit(refined("a"))
    bench.turn(3)
    bench.engine.unload(model)
    while not bench.results:
        bench.turn()
        assert bench.results or not gone
    bench.run()
    assert gone == [model]


def test_a_reload_waits_for_all_legs(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And requests that come later, with a changed model as either, wait for that."""
    order: list[str] = []
    monkeypatch.setattr(pool, "keeps", lambda name, cards: name != "second", raising=False)
    monkeypatch.setattr(pool, "replace", lambda card: order.append(card.id) or True, raising=False)
    bench = Bench(pool)
    bench.engine.submit(refined("open"))
    bench.turn(3)
    bench.engine.reload(pool.cards, "info")
    for one in (refined("later"), request("other", steps=2)):
        bench.engine.submit(one)
    bench.until(lambda: ("other", 0) in bench.results)
    assert order == []
    bench.until(lambda: ("open", 0) in bench.results)
    assert ("later", 0) not in bench.results
    bench.run()
    assert order == ["second"] and len(bench.results) == 3


def test_the_page_shows_the_second_encode_where_its_first_line_stands(pool: FakePool) -> None:
    page = Page(pool)
    page.bench.run([refined("a")])
    assert [places[0][-1] for places, _ in page.shown if places] == [-1, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert [tick.phase for tick in page.bench.of(Tick)] == [
        "encode",
        *["denoise"] * 6,
        "encode",
        *["denoise"] * 2,
        "decode",
    ]


@pytest.mark.parametrize("apart", [-1, 5, 6, 7, 8])
def test_a_suspect_is_alone_up_to_its_line_also_in_its_second_encode(pool: FakePool, apart: int) -> None:
    page = Page(pool)
    sick = changed(refined("sick"), apart=((0, apart),))
    page.bench.run([sick, refined("good"), refined("fine")])
    for places, _ in page.shown:
        assert len(places) == 1 or not any(name == "sick" and line <= apart for name, _, line in places)
    assert len(page.bench.results) == 3
    shared = [line for places, _ in page.shown if len(places) > 1 for name, _, line in places if name == "sick"]
    assert bool(shared) == (apart == -1), "the others are ahead by then"
    assert page.ticks().count(("encode", 2)) == 2


def test_what_it_waits_between_its_legs_is_in_its_queue(pool: FakePool) -> None:
    """A second for each work, ten before the first, and a hundred without the second model."""
    clock = Clock()

    class Slow(FakeFamily):
        def denoise(self, *args: Any) -> Any:
            clock.now += 1.0
            return super().denoise(*args)

        def encode(self, *args: Any) -> Any:
            clock.now += 3.0
            return super().encode(*args)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            clock.now += 5.0
            return super().decode(latents)

    pool = FakePool(Slow(card()), Slow(card("second")))
    pool.present = {"fake"}
    bench = Bench(pool, clock=clock)
    bench.engine.submit(changed(refined("a"), arrived=-10.0))
    bench.run()
    clock.now += 100.0
    pool.present.add("second")
    bench.run()
    timings = bench.results["a", 0].timings
    assert (timings.queue, timings.encode, timings.denoise, timings.decode) == (110.0, 6.0, 8.0, 5.0)
    assert (timings.steps, timings.shared) == (8, 1.0)


class Uneven(FakeCosts):
    """A pass of the second model takes a tenth of one of the first, which takes a second."""

    def stored(self, family: Any, key: Key) -> Curve | None:
        return Still({16: 1.6 if key.model == "second" else 16.0})


def test_a_deadline_is_compared_with_what_each_model_takes(pool: FakePool) -> None:
    """12.4 seconds for a guided image, of which the second model takes 0.4; what is not measured takes no time."""
    clock = Clock()
    bench = Bench(pool, costs=Uneven(), clock=clock)
    bench.run([refined("near", deadline=12.1)])
    assert ("near", 0) in bench.results, "the second model was not measured yet"
    bench.run([refined("far", deadline=12.5), refined("late", deadline=12.3)])
    assert ("far", 0) in bench.results and list(bench.failures) == ["late"]
    assert isinstance(bench.failures["late"].error, DeadlineExceeded)


def test_one_that_has_begun_has_until_its_deadline(pool: FakePool) -> None:
    clock = Clock()
    bench = Bench(pool, costs=Uneven(), clock=clock)
    bench.run([refined("warm")])
    pool.present = {"fake"}
    bench.run([refined("a", deadline=100.0), refined("b", deadline=100.0)])
    clock.now = 99.9
    bench.run()
    assert not bench.failures and bench.engine.batcher.waiting == 2
    clock.now = 100.1
    bench.run()
    assert sorted(bench.failures) == ["a", "b"] and held(bench, pool) == 0


def test_the_older_half_drawn_row_goes_before_younger_ones_of_the_same_work() -> None:
    """And the kit's head is the row that came first, not the one that came to this queue first."""
    simulation = Simulation(fixed(1))
    old = row(5, legs=((KEY, 2), (OTHER, 3)))
    simulation.add(old)
    for _ in range(3):
        simulation.turn()
    young = [row(3, key=OTHER) for _ in range(3)]
    simulation.now += 1
    simulation.add(*young)
    assert old.line == 2 and old.key == OTHER and simulation.batcher.heads() == [old]
    simulation.run()
    assert sorted(simulation.ended, key=simulation.ended.__getitem__)[0] is old


def test_of_many_half_drawn_rows_the_oldest_is_the_head() -> None:
    batcher = Simulation(fixed(4)).batcher
    half = [row(5, legs=((KEY, 2), (OTHER, 3))) for _ in range(3)]
    for one in (*half, row(3, key=OTHER)):
        batcher.add(one)
    for one in half:
        batcher.start(one)
        one.line = 2
    for nth in (1, 0, 2):
        batcher.switch(half[nth])
    for one in half:
        assert batcher.heads() == [one]
        batcher.remove(one)
    assert [one.lines for one in batcher.heads()] == [3]


def test_rows_age_by_all_that_they_have_waited_in_both_queues() -> None:
    """Under endless short arrivals for its second model, a half-drawn row ends."""
    simulation = Simulation(fixed(1))
    old = row(40, legs=((KEY, 2), (OTHER, 38)))
    simulation.add(old)
    for _ in range(3):
        simulation.turn()
    assert old.stage == "waiting" and old.begun
    while old not in simulation.ended and simulation.now < 10_000:
        if simulation.batcher.waiting < 3:
            simulation.add(row(2, key=OTHER), row(2))
        simulation.turn()
    assert 40 * 8 < simulation.ended[old] < 40 * 8 + 100


def test_a_second_leg_counts_as_not_begun_for_what_is_encoded_ahead() -> None:
    simulation = Simulation(fixed(2, slots=64, encode=4))
    halves = [row(6, legs=((KEY, 2), (OTHER, 4))) for _ in range(8)]
    simulation.add(*halves)
    simulation.run()
    assert simulation.ended.keys() == set(halves)
    assert simulation.batcher.running == simulation.batcher.waiting == 0


def test_suspects_of_two_legs_are_alone_in_any_traffic() -> None:
    simulation = Watched(8)
    some = [row(5, legs=((KEY, number), (OTHER, 5 - number))) for number in (1, 2, 3, 4)]
    for number, one in enumerate(some):
        one.apart = (-2, -1, 2, 9)[number]
    simulation.add(*some, row(7), row(7, key=OTHER))
    simulation.run()
    assert len(simulation.ended) == 6
