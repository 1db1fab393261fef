"""Suspects, at which an engine process died: alone up to that line, while others go on, and with the same pixels."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cards.cards import read_cards
from app.engine.costs import Costs
from app.engine.row import Row, Work
from app.pool.pool import Pool
from app.report import Place, Preview, Progress, Tick
from app.request import ImageSpec, Prompt, Request
from tests.engine.test_mixed import ask, traffic
from tests.parts.close import SAME, close
from tests.parts.engine import NOWHERE, Bench, Costly, FakeCosts, FakeFamily, FakePool, card, load_all, request
from tests.parts.requests import changed
from tests.parts.simulation import HELD, OTHER, Simulation, fixed, row

LINES = 6


def suspect(apart: int, steps: int = LINES, **facts: object) -> Row:
    made = row(steps, **facts)
    made.apart = apart
    return made


class Watched(Simulation):
    """Notes every work as its phase and its rows, and asserts that no suspect shares one."""

    def __init__(self, passes: int = 16) -> None:
        super().__init__(fixed(passes))
        self.works: list[tuple[str, list[Row]]] = []
        self._next, self.batcher.next = self.batcher.next, self._noting  # type: ignore[method-assign]

    def _noting(self, now: float) -> Work | None:
        work = self._next(now)
        if work is not None:
            assert len(work.rows) == 1 or not any(each.suspect for each in work.rows)
            self.works.append((work.phase, list(work.rows)))
        return work

    def place(self, *rows: Row) -> None:
        """Put started rows there, at the line that they have; those at their last line are finished."""
        for each in rows:
            self.add(each)
            each.lease = HELD
        self.batcher.late(self.now)
        for each in rows:
            self.batcher.start(each)
            if each.line == each.lines:
                self.batcher.finish(each)

    def of(self, one: Row) -> list[tuple[str, int]]:
        """The phases of a row with how many rows each work had."""
        return [(phase, len(rows)) for phase, rows in self.works if one in rows]


@pytest.mark.parametrize(
    ("apart", "alone"), [(-2, 0), (-1, 0), (0, 1), (3, 4), (LINES - 1, LINES), (LINES, LINES), (99, LINES)]
)
def test_it_is_alone_up_to_its_line_and_shares_at_once_after_that(apart: int, alone: int) -> None:
    """Three longer ones run already."""
    simulation, one = Watched(), suspect(apart)
    simulation.place(*(row(LINES + 8) for _ in range(3)))
    simulation.add(one)
    simulation.run()
    forwards = [("denoise", 1)] * alone + [("denoise", 4)] * (LINES - alone)
    assert simulation.of(one) == [("encode", 1), *forwards, ("decode", 1)]
    assert len(simulation.ended) == 4 and len(simulation.forwards) == LINES + 8 + alone


def test_it_is_encoded_alone_and_only_then() -> None:
    for apart, encodes in ((-2, [4]), (-1, [1, 3]), (5, [1, 3])):
        simulation = Watched()
        simulation.add(suspect(apart), *(row(LINES + 8) for _ in range(3)))
        simulation.run()
        assert [len(rows) for phase, rows in simulation.works if phase == "encode"] == encodes


def test_it_is_decoded_alone_where_the_decode_is_its_line() -> None:
    simulation = Watched()
    good, sick, fine, past = row(3), suspect(3, steps=3), row(3), suspect(2, steps=3)
    for each in (good, sick, fine, past):
        each.line = 3
    simulation.place(good, sick, fine, past)
    simulation.run()
    assert simulation.works == [("decode", [good, fine, past]), ("decode", [sick])]


def test_the_others_do_not_wait_for_it() -> None:
    """Those that are shorter end when they would without it, and nobody is later than by its own forwards."""
    simulation, one = Watched(), suspect(3)
    short, long = [row(4) for _ in range(3)], [row(20) for _ in range(3)]
    simulation.add(*short, one, *long)
    simulation.run()
    assert {simulation.ended[each] for each in short} == {4.0}
    assert simulation.ended[one] == 4.0 + LINES and {simulation.ended[each] for each in long} == {20.0 + 4}


def test_two_suspects_are_never_together() -> None:
    simulation = Watched()
    rows = [suspect(LINES) for _ in range(4)]
    simulation.add(*rows)
    simulation.run()
    assert len(simulation.forwards) == 4 * LINES and len(simulation.ended) == 4
    assert [phase for phase, _ in simulation.works].count("decode") == 4


def test_while_a_model_is_loaded_it_waits_in_every_phase_and_the_others_go_on() -> None:
    simulation = Watched()
    waiting, started, finished = suspect(-1), suspect(99), suspect(99)
    finished.line = LINES
    simulation.place(started, finished)
    simulation.add(waiting, good := row(3))
    simulation.batcher.loading = True
    simulation.run()
    assert simulation.of(good) == [("encode", 1), *[("denoise", 1)] * 3, ("decode", 1)] and good.stage == "gone"
    assert (waiting.stage, started.stage, finished.stage) == ("waiting", "started", "finished")
    simulation.batcher.loading = False
    simulation.run()
    assert {waiting.stage, started.stage, finished.stage} == {"gone"}


def test_however_many_wait_for_a_load_the_others_go_on() -> None:
    simulation = Watched(passes=2)
    waiting, good = [suspect(99, steps=2) for _ in range(4)], row(6)
    simulation.add(*waiting, good)
    simulation.batcher.loading = True
    simulation.run()
    assert simulation.ended == {good: 6.0}
    simulation.batcher.loading = False
    simulation.run()
    assert simulation.ended.keys() == {good, *waiting}


def test_suspects_end_under_endless_short_arrivals() -> None:
    simulation, one = Watched(2), suspect(99, steps=20)
    simulation.add(one)
    while one not in simulation.ended and simulation.now < 10_000:
        if simulation.batcher.waiting < 4:
            simulation.add(row(3), row(3))
        simulation.turn()
    assert one in simulation.ended and any(one not in rows for rows in simulation.forwards)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(-2, 8), st.booleans(), st.booleans(), st.sampled_from("abc")),
        min_size=1,
        max_size=14,
    ),
    st.integers(1, 8),
    st.lists(st.booleans(), max_size=40),
)
def test_in_any_traffic_all_end_and_no_suspect_shares(
    facts: list[tuple[int, int, bool, bool, str]], passes: int, loads: list[bool]
) -> None:
    simulation = Watched(passes)
    rows = []
    for steps, apart, guided, other, tenant in facts:
        more = {"key": OTHER} if other else {}
        rows.append(suspect(apart, steps=steps, guided=guided, tenant=tenant, weight=1.0, **more))
        simulation.add(rows[-1])
        simulation.turn()
    for loading in (*loads, False):
        simulation.batcher.loading = loading
        simulation.turn()
    simulation.run()
    assert simulation.ended.keys() == set(rows) and not simulation.batcher.running + simulation.batcher.waiting


def test_among_equals_the_first_to_arrive_goes_first_also_when_it_comes_from_another_process() -> None:
    """The sequence is of this process; the arrival is not. One that waited longest in a lane, and one among started."""
    simulation = Simulation(fixed(1))
    rows = [row(5) for _ in range(4)]
    for each, arrived in zip(rows, (3.0, 1.0, 2.0, 0.0), strict=True):
        each.arrived = arrived
        simulation.batcher.add(each)
    simulation.now = 4.0
    simulation.run()
    assert sorted(rows, key=simulation.ended.__getitem__) == [rows[3], rows[1], rows[2], rows[0]]


class Page:
    """What the engine shows, in turn with what it reports."""

    def __init__(self, pool: object, **bench: object) -> None:
        self.shown: list[tuple[list[Place], str]] = []
        self.bench = Bench(pool, computes=lambda places, model: self.shown.append((list(places), model)), **bench)

    def ticks(self) -> list[tuple[str, int]]:
        return [(tick.phase, tick.rows) for tick in self.bench.of(Tick)]


@pytest.fixture
def pool() -> FakePool:
    return FakePool(FakeFamily(card()), FakeFamily(card("second")))


def test_before_each_work_the_page_has_its_rows_and_it_is_empty_when_idle(pool: FakePool) -> None:
    page = Page(pool)
    page.bench.run([request("a", steps=2), request("b", steps=3)])
    a, b = (("a", 0), ("b", 0))
    places = [sorted(places) for places, _ in page.shown]
    assert places == [
        [], [(*a, -1), (*b, -1)], [(*a, 0), (*b, 0)], [(*a, 1), (*b, 1)], [(*a, 2)], [(*b, 2)], [(*b, 3)], [],
    ]  # fmt: skip
    assert [model for _, model in page.shown] == ["fake 32x32"] + 7 * [""], "the measurement comes first"
    assert page.ticks() == [("encode", 2), ("denoise", 2), ("denoise", 2), ("decode", 1), ("denoise", 1), ("decode", 1)]
    page.bench.turn(3)
    assert len(page.shown) == 8, "idle, it is written once"


def test_a_measurement_shows_its_model_and_size_and_no_rows() -> None:
    clock = [0.0]
    family = Costly(lambda passes: 1e-3 * passes, clock)
    page = Page(FakePool(family), costs=Costs(NOWHERE), clock=lambda: clock[0])
    page.bench.run([request("a", steps=2)])
    models = [model for places, model in page.shown if not places]
    assert models[0] == "fake 32x32" and models[-1] == "" and set(models) == {"fake 32x32", ""}
    assert all(model == "" for places, model in page.shown if places) and family.widths
    assert next(places for places, _ in page.shown if places) == [("a", 0, -1)]


def test_a_suspect_is_shown_alone_and_its_preview_counts_as_its_work(pool: FakePool) -> None:
    page = Page(pool)
    sick = changed(request("sick", steps=4, previews=1, progress=True), apart=((0, 2),))
    page.bench.run([sick, request("good", steps=9)])
    for places, _ in page.shown:
        assert len(places) == 1 or ("sick", 0) not in {place[:2] for place in places if place[2] <= 2}
    lines = [place[2] for places, _ in page.shown for place in places if place[0] == "sick"]
    assert lines == [-1, 0, 1, 2, 3, 4]
    assert [report.partial for report in page.bench.of(Preview)] == [0] and len(page.bench.results) == 2


def test_where_a_page_has_several_works_a_suspect_has_it_alone(pool: FakePool) -> None:
    """As on a GPU, which shows an error up to two works late."""
    page = Page(pool)
    page.bench.engine._shown = deque(maxlen=3)
    page.bench.run([changed(request("sick", steps=6), apart=((0, 2),)), request("good", steps=9)])
    for places, _ in page.shown:
        assert len(places) == 1 or not any(name == "sick" and line <= 2 for name, _, line in places)
    assert max(len(places) for places, _ in page.shown) == 6, "three works of two rows"


def test_only_images_without_an_answer_are_drawn(pool: FakePool) -> None:
    images = tuple(ImageSpec(Prompt(f"p{index}"), 40 + index) for index in range(4))
    whole = Bench(pool).run([request("a", images=images)]).results
    bench = Bench(pool).run([request("a", images=images, done=frozenset({0, 2}))])
    assert bench.results.keys() == {("a", 1), ("a", 3)}
    for name, result in bench.results.items():
        assert (result.seed, result.index) == (whole[name].seed, name[1])
        np.testing.assert_array_equal(result.pixels, whole[name].pixels)


def test_what_it_waited_in_another_process_is_its_queue(pool: FakePool) -> None:
    clock = [100.0]
    bench = Bench(pool, clock=lambda: clock[0])
    bench.run([request("old", arrived=40.0), request("new")])
    assert [bench.results[name, 0].timings.queue for name in ("old", "new")] == [60.0, 0.0]


def test_a_row_that_waited_in_another_process_has_aged(pool: FakePool) -> None:
    """It goes before a shorter one that has just come."""
    clock = [1000.0]
    orders = []
    for arrived in (0.0, None):
        bench = Bench(pool, costs=FakeCosts(passes=2), clock=lambda: clock[0])
        bench.run([request("long", steps=8, arrived=arrived, progress=True), request("short", steps=4, progress=True)])
        orders.append([report.request_id for report in bench.of(Progress)])
    assert orders == [["long"] * 8 + ["short"] * 4, ["short"] * 4 + ["long"] * 8]


def sick(requests: list[Request], seed: int) -> list[Request]:
    """Two thirds of the requests with lines, of all phases, up to which they are apart."""
    dice = random.Random(seed)
    some = []
    for number, each in enumerate(requests):
        lines = 2 * each.recipe.steps
        apart = tuple((index, dice.choice((-1, 0, 1, lines // 2, lines))) for index in range(len(each.images)))
        some.append(changed(each, apart=apart) if number % 3 else each)
    return some


@pytest.mark.slow
def test_all_pixels_equal_those_of_the_same_request_alone(tiny_pool: Pool) -> None:
    asked = sick([each for each in traffic(tiny_pool.cards, 72, seed=3) if each.recipe.steps <= 10], seed=4)
    page = Page(tiny_pool, costs=FakeCosts(passes=24))
    page.bench.run(asked)
    lines = {(each.id, index): line for each in asked for index, line in each.delivery.apart}
    for places, _ in page.shown:
        assert len(places) < 2 or not any(line <= lines.get((name, index), -2) for name, index, line in places)
    assert max(len(places) for places, _ in page.shown) >= 4, "the others never shared a forward"
    assert len(page.bench.results) == len(asked) > 30
    for each in asked:
        alone = Bench(tiny_pool).run([changed(each, apart=())]).results[each.id, 0]
        close(page.bench.results[each.id, 0].latents, alone.latents, SAME, of=each)


@pytest.fixture
def exact(tiny: Path) -> Iterator[Pool]:
    cards = {name: one for name, one in read_cards(tiny).items() if name in ("tiny-dit", "tiny-sd3")}
    pool = load_all(Pool(cards, "cpu", torch.float32))
    yield pool
    pool.close()


def test_in_deterministic_mode_they_are_equal_bit_for_bit(exact: Pool) -> None:
    dice = random.Random(2)
    plain = [
        ask(one, number, dice, steps=5, width=32, height=32, guided=number % 2 == 0)
        for one in exact.cards.values()
        for number in range(6)
    ]
    asked = sick(plain, seed=1)
    mixed = Bench(exact, deterministic=True, costs=FakeCosts(passes=24)).run(asked).results
    for each in plain:
        alone = Bench(exact, deterministic=True).run([each]).results[each.id, 0]
        np.testing.assert_array_equal(mixed[each.id, 0].pixels, alone.pixels)
        np.testing.assert_array_equal(mixed[each.id, 0].latents, alone.latents)


def test_a_suspect_that_is_cancelled_leaves_nothing(pool: FakePool) -> None:
    bench = Bench(pool)
    bench.engine.submit(request("sick", apart=((0, 99),)))
    bench.turn(4)
    bench.engine.cancel("sick")
    bench.run([request("good")])
    assert bench.failures.keys() == {"sick"} and ("good", 0) in bench.results and pool.leases == 0
